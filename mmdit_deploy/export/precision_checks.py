"""What a request says of precision must fit together: no option is taken and then ignored."""

from __future__ import annotations

from mmdit_deploy.errors import UsageError
from mmdit_deploy.export.request import ExportRequest
from mmdit_deploy.spec import QUANTIZED


def check_precision(request: ExportRequest) -> None:
    """Check the options of precision against each other.

    Raises:
        UsageError: one contradicts another, or would do nothing.
    """
    _check_quantized(request)
    _check_schemes(request)
    _check_calibration(request)
    if request.fp16_plan is not None and request.precision.base != "fp16":
        raise UsageError(
            "--fp16-plan says what an fp16 model keeps in fp32",
            received=f"--fp16-plan {request.fp16_plan} with {request.precision.label}",
            fix="drop it, or compute in fp16",
        )
    if request.budget is not None and not 0 < request.budget < 1:
        raise UsageError(
            "--budget is the largest relative L2 error, between 0 and 1",
            received=f"{request.budget}",
            fix="e.g. --budget rel_l2=0.02",
        )


def _check_quantized(request: ExportRequest) -> None:
    if request.precision.quantized:
        return
    given = {
        "--quantize or a recipe's [quantization]": request.quantization,
        "--scales": request.scales,
        "--budget": request.budget,
    }
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} goes with a quantized precision: {', '.join(QUANTIZED)}",
                received=f"it with {request.precision.name}",
                fix="drop it, or add e.g. --fp8",
            )


def _check_schemes(request: ExportRequest) -> None:
    recipe = request.quantizes
    if recipe is None:
        return
    if request.precision.name != "fp4" and any(scheme.weights == "fp4" for scheme in recipe.schemes.values()):
        raise UsageError(
            "the scheme fp4 goes with --fp4: where FP4 is emulated, its name says so",
            received=f"it with {request.precision.label}",
            fix="--fp4, with --quantize ROLE=fp8 for the other roles",
        )
    modulated = recipe.schemes.get("modulation")
    if modulated is not None and modulated.activations != "none":
        raise UsageError(
            "the modulations of all blocks are one product, whose weights alone can be quantized",
            received=f"modulation={modulated.name}",
            fix="--quantize modulation=fp8-weights, or modulation=w4a16",
        )


def _check_calibration(request: ExportRequest) -> None:
    """Where calibration finds nothing, nothing may be said of it."""
    if request.graph_only:
        given = {"--calib": request.calib, "--budget": request.budget, "--fp16-plan": request.fp16_plan}
        for option, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{option} needs the weights, and a graph is made without them",
                    received=f"--graph-only and {option}",
                    fix="drop one of them",
                )
    for option, value in {"--calib": request.calib, "--budget": request.budget}.items():
        if request.scales is not None and value is not None:
            raise UsageError(
                "scales are taken over from a file, or found by calibration",
                received=f"--scales and {option}",
                fix="drop one of them",
            )
    if request.calib is not None and not (request.precision.quantized or request.seeks_islands):
        raise UsageError(
            "--calib says what to calibrate on",
            received=f"--calib with {request.precision.label}, where nothing is calibrated",
            fix="drop it, or add --fp16-plan auto or a quantized precision, e.g. --fp8",
        )
