"""Attentions of a function in FP8.

    Attention(q, k, v)         ⇒   MMDiTFP8Attention(q, k, v, q_scale, k_scale, v_scale)
    Attention(q, k, v, mask)   ⇒   MMDiTFP8MaskedAttention(q, k, v, mask, q_scale, k_scale, v_scale)

TensorRT fuses attention in FP8 only where it is spelled out, with Q/DQ on scaled Q, on K, on V and on the softmax: that
is what these named functions are. The scales are inputs of the function around, ``attention.<i>.q_scale`` and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.named_functions import DOMAIN, FP8_ATTENTION, FP8_MASKED_ATTENTION

SCALES = ("q_scale", "k_scale", "v_scale")


def fp8_attention(function: ir.Function, count: int) -> None:
    """Turn the first attentions of a function, so many, into FP8's, in place.

    Raises:
        GraphError: it has fewer, or one that is not plain.
    """
    attentions = [node for node in function if node.op_type == "Attention"]
    if count > len(attentions):
        raise GraphError(
            f"{function.name} has {len(attentions)} attentions",
            received=f"a plan with {count} in FP8",
            fix="plan the attentions that the block has",
        )
    for i, node in enumerate(attentions[:count]):
        _replace(function, node, i)
    if count:
        function.opset_imports.setdefault(DOMAIN, 1)


def _replace(function: ir.Function, node: ir.Node, index: int) -> None:
    q, *rest = node.inputs
    heads = node.attributes.get_int("q_num_heads", 0)
    width = q.shape[-1] if q is not None and q.shape is not None and len(q.shape) == 3 else None
    plain = heads == node.attributes.get_int("kv_num_heads", 0) and not (
        node.attributes.get_int("is_causal", 0) or _softcap(node)
    )
    if q is None or q.dtype is None or not isinstance(width, int) or not heads or not plain or not 2 <= len(rest) <= 3:
        raise GraphError(
            "an attention in FP8 is in [batch, tokens, width] layout, with as many heads of Q as of K and only a mask",
            received=f"{node.name} of {function.name}",
            fix="leave it out of the plan",
        )
    scales = [
        ir.Value(name=f"attention.{index}.{name}", type=ir.TensorType(q.dtype), shape=ir.Shape([])) for name in SCALES
    ]
    function.inputs.extend(scales)
    head_dim = width // heads
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1 / math.sqrt(head_dim)
    attributes: dict[str, Sequence[int] | float] = {
        "heads": [0, 0, heads, head_dim],
        "joined": [0, 0, width],
        "scale": scale,
    }
    name = FP8_ATTENTION
    if len(rest) == 3:
        name, rest[2] = FP8_MASKED_ATTENTION, _of_keys(rest[2])
    call = ir.node(name, [q, *rest, *scales], domain=DOMAIN, attributes=attributes, name=node.name)
    made = [node.outputs[0]]
    ir.convenience.replace_nodes_and_values(function, node, [node], [call], made, call.outputs)


def _softcap(node: ir.Node) -> float:
    attribute = node.attributes.get("softcap")
    return 0.0 if attribute is None else attribute.as_float()


def _of_keys(mask: ir.Value | None) -> ir.Value | None:
    """A mask before it is spelled out for every query: it is added here, and broadcasts."""
    node = mask.producer() if mask is not None else None
    if mask is None or node is None or node.op_type != "Expand" or node.inputs[0] is None:
        return mask
    source, shape = node.inputs[0], mask.shape
    if source.shape is None or shape is None or len(source.shape) != len(shape):
        return mask
    same = all(a in (b, 1) for a, b in zip(source.shape, shape, strict=True))
    # Along the batch it may be one for all, along the keys it must be what it is.
    return source if same and source.shape[-1] == shape[-1] else mask
