"""RMSNormalization in ops of opset 17.

    RMSNormalization(x, w)   ⇒   x / Sqrt(ReduceMean(x · x) + ε) · w

Computed in the type that the op says, mostly fp32, and multiplied by the weight in the weight's.
"""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.lower.decomposed_nodes import Replacement, nodes_of, own_attributes
from mmdit_deploy.graph.passes import Pass, label


def _spell_out(model: ir.Model) -> int:
    nodes = nodes_of(model, "RMSNormalization")
    for node in nodes:
        _spell_norm_out(node)
    return len(nodes)


def _spell_norm_out(node: ir.Node) -> None:
    attributes = own_attributes(node)
    axes = _axes(node, attributes.get("axis", -1))
    new = Replacement(node)
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    wide = new.cast(x, ir.DataType(attributes.get("stash_type", ir.DataType.FLOAT)))
    mean = new("ReduceMean", new("Mul", wide, wide), axes=axes, keepdims=1)
    root = new("Sqrt", new("Add", mean, new.number(attributes.get("epsilon", 1e-5), mean)))
    normed = new.cast_like(new("Div", wide, root), x)
    new.done(new("Mul", normed if weight.dtype == x.dtype else new.cast_like(normed, weight), weight))


def _axes(node: ir.Node, axis: int) -> list[int]:
    """From one axis to the last, counted from behind."""
    x = node.inputs[0]
    if axis >= 0:
        if x is None or x.shape is None:
            raise UsageError(
                "how many axes a norm is over must be known to spell it out",
                received=f"{label(node)}, over axes from {axis} on, of a tensor whose rank is not known",
                fix="run ONNX's shape inference on the model first",
            )
        axis -= len(x.shape)
    return list(range(axis, 0))


rms_norm: Pass = Pass("RMS norm spelled out", _spell_out)
