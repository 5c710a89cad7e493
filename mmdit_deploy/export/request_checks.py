"""What a request says must fit together, and name what exists: the checks that cost nothing."""

from __future__ import annotations

from mmdit_deploy.build import Target, check_targets
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import UsageError
from mmdit_deploy.export.precision_checks import check_precision
from mmdit_deploy.export.request import ExportRequest


def check_request(request: ExportRequest) -> tuple[tuple[Target, ...], Contract]:
    """The targets and the contract, after the checks that the request alone decides.

    Raises:
        UsageError: the request contradicts itself, or names something that does not exist.
    """
    blocks = request.spec.block_names
    if len(set(request.outputs)) < len(request.outputs) or not set(request.outputs) <= set(blocks):
        single = f", single_blocks.0 to {blocks[-1]}" if request.spec.single_depth else ""
        raise UsageError(
            f"outputs are named blocks.0 to blocks.{request.spec.depth - 1}{single}, each once",
            received=", ".join(ascii(name) for name in request.outputs),
            fix="name blocks of this model",
        )
    check_precision(request)
    targets = check_targets(request.targets, request.precision, request.schemes)
    if request.profiles and not any(target.flavour for target in targets):
        raise UsageError(
            "optimization profiles are TensorRT's",
            received=f"--profile with {', '.join(target.name for target in targets)}",
            fix="drop it, or add a TensorRT target, e.g. --target rtx:sm89",
        )
    if request.segments is not None and (request.graph_only or not any(target.flavour for target in targets)):
        without = "--graph-only" if request.graph_only else ", ".join(target.name for target in targets)
        fix = "one of them" if request.graph_only else "it, or add a TensorRT target, e.g. --target rtx:sm89"
        raise UsageError(
            "segments are what a TensorRT engine is cut into",
            received=f"--segments {request.segments} with {without}",
            fix=f"drop {fix}",
        )
    contract = Contract.of(
        request.spec, request.precision, request.ranges, outputs=request.outputs, profiles=request.profiles
    )
    return targets, contract
