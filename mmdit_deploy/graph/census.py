"""Count what a graph holds and compare it with what the spec implies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from mmdit_deploy.errors import GraphError
from mmdit_deploy.spec import ModelSpec

COUNTED = ("Attention", "RMSNormalization", "LayerNormalization", "Gelu", "Softmax")


def census(model: ir.Model) -> dict[str, int]:
    """Nodes by op type that one run executes: a function's nodes count once per call."""
    functions = {f.name: f for f in model.functions.values()}

    def count(nodes: ir.Graph | ir.Function) -> Counter[str]:
        total: Counter[str] = Counter()
        for node in nodes:
            total += count(functions[node.op_type]) if node.op_type in functions else Counter([node.op_type])
        return total

    return dict(count(model.graph))


def implied(spec: ModelSpec) -> dict[str, int]:
    """What the spec implies: attentions and norms as single nodes, and no softmax on its own."""
    blocks = spec.blocks
    qk_norms = 4 * len(blocks) + 2 * sum(b.dual_attention for b in blocks) if spec.qk_norm else 0
    streams = [stream_ends for b in blocks for stream_ends in (False, b.text_ends)]
    return {
        "Attention": sum(b.attentions for b in blocks),
        "RMSNormalization": qk_norms,
        # A stream has a norm before its attention and one before its MLP; the head has one.
        "LayerNormalization": sum(1 if ends else 2 for ends in streams) + 1,
        "Gelu": sum(not ends for ends in streams),
        "Softmax": 0,
    }


def check_census(model: ir.Model, spec: ModelSpec) -> Mapping[str, int]:
    """The counts that matter, when they are what the spec implies.

    Raises:
        GraphError: a count differs: a fusion did not fire, or the graph is of another model.
    """
    found, expected = census(model), implied(spec)
    wrong = {op: (n, found.get(op, 0)) for op, n in expected.items() if found.get(op, 0) != n}
    if wrong:
        raise GraphError(
            "the standard graph has each attention and norm of the spec as one node",
            received="; ".join(f"{op}: expected {want}, found {got}" for op, (want, got) in wrong.items()),
            fix="a fusion did not fire: report this as a bug, with torch's and onnxscript's versions",
        )
    return {op: found.get(op, 0) for op in expected}
