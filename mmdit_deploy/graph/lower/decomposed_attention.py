"""Attention in ops of opset 17.

    Attention(q, k, v, mask)   ⇒   Softmax(q · scale · kᵀ + mask) · v

The scale goes on Q before the product, as fused attentions want it. A row whose keys are all masked gives zeros, as the
op does; its softmax alone would be 0/0.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.lower.decomposed_nodes import Replacement, nodes_of, own_attributes
from mmdit_deploy.graph.passes import Pass, label

_READ = frozenset("is_causal kv_num_heads q_num_heads qk_matmul_output_mode scale softcap softmax_precision".split())
_INPUTS = 6  # Q, K, V, mask, and the K and V of tokens that came before
_NEVER = -math.inf


def _spell_out(model: ir.Model) -> int:
    nodes = nodes_of(model, "Attention")
    for node in nodes:
        spell_attention_out(node)
    return len(nodes)


def spell_attention_out(node: ir.Node) -> None:
    """Replace one `Attention` by what it computes."""
    attributes = own_attributes(node)
    _check(node, attributes)
    new = Replacement(node)
    inputs = [*node.inputs, *[None] * (_INPUTS - len(node.inputs))]
    q, k, v, mask, past_k, past_v = inputs
    assert q is not None and k is not None and v is not None
    merged = _is_merged(q, attributes)
    if merged:
        q = _split_heads(new, q, attributes["q_num_heads"])
        k, v = (_split_heads(new, x, attributes["kv_num_heads"]) for x in (k, v))
    if past_k is not None and past_v is not None:
        k, v = new("Concat", past_k, k, axis=2), new("Concat", past_v, v, axis=2)
    present = (k, v)
    if _is_grouped(node, q, k, attributes):
        k, v = _repeat_heads(new, q, k), _repeat_heads(new, q, v)

    scaled = new("Mul", q, _scale(new, q, node.inputs[0], attributes))
    scores = [new("MatMul", scaled, new("Transpose", k, perm=[0, 1, 3, 2]))]  # before and after each step
    scores.append(_capped(new, scores[-1], attributes.get("softcap", 0.0)))
    masked = scores[-1] if mask is None else _masked(new, scores[-1], mask)
    causal = attributes.get("is_causal", 0)
    scores.append(_masked(new, masked, _earlier(new, q, k, past_k)) if causal else masked)
    scores.append(_softmax(new, scores[-1], attributes, guarded=mask is not None or bool(causal)))

    y = new("MatMul", scores[-1], v)
    if merged:
        y = new.reshape(new("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, -1)
    asked = len(node.outputs) > 3 and node.outputs[3].name
    told = scores[attributes.get("qk_matmul_output_mode", 0)] if asked else None
    results = [y, *(new("Identity", x) if wanted else None for x, wanted in zip(present, _wanted(node), strict=True))]
    new.done(*results, told if told is None else new("Identity", told))


def _check(node: ir.Node, attributes: dict[str, Any]) -> None:
    unread = sorted(attributes.keys() - _READ)
    more = [v for v in node.inputs[_INPUTS:] if v is not None]
    if unread or more:
        what = f"its {', '.join(unread)}" if unread else "lengths of its keys"
        raise UsageError(
            "an attention is spelled out as opset 23 defines it",
            received=f"{label(node)}, with {what}",
            fix="export the model again with opset 23",
        )


def _wanted(node: ir.Node) -> list[bool]:
    """Whether the keys and the values are read that the next call gets as past."""
    return [len(node.outputs) > i and bool(node.outputs[i].name) for i in (1, 2)]


def _is_merged(q: ir.Value, attributes: dict[str, Any]) -> bool:
    """Whether heads are next to each other, (B, N, H·D)."""
    return len(q.shape) == 3 if q.shape is not None else bool(attributes.get("q_num_heads"))


def _split_heads(new: Replacement, x: ir.Value, heads: int) -> ir.Value:
    return new("Transpose", new.reshape(x, 0, 0, heads, -1), perm=[0, 2, 1, 3])


def _is_grouped(node: ir.Node, q: ir.Value, k: ir.Value, attributes: dict[str, Any]) -> bool:
    """Whether queries have more heads than keys, for all that is known."""
    if "q_num_heads" in attributes and "kv_num_heads" in attributes:
        return bool(attributes["q_num_heads"] != attributes["kv_num_heads"])
    shapes = [v.shape if v is not None else None for v in node.inputs[:2]]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return True
    of_q, of_k = (shape[1] for shape in shapes if shape is not None)
    nameless = isinstance(of_q, ir.SymbolicDim) and of_q.value is None
    return nameless or of_q != of_k


def _repeat_heads(new: Replacement, q: ir.Value, x: ir.Value) -> ir.Value:
    """Each head as often as there are heads of Q for it: [B, H/g, N, D] ⇒ [B, H/g, g, N, D] ⇒ [B, H, N, D]."""
    one = new.ints(1)
    times = new("Div", new.dims(q, 1, 2), new.dims(x, 1, 2))
    repeated = new("Expand", new("Unsqueeze", x, new.ints(2)), new("Concat", one, one, times, one, one, axis=0))
    shape = new("Concat", new.dims(x, 0, 1), new.dims(q, 1, 2), new.dims(x, 2, 4), axis=0)
    return new("Reshape", repeated, shape)


def _scale(new: Replacement, q: ir.Value, given: ir.Value | None, attributes: dict[str, Any]) -> ir.Value:
    if "scale" in attributes:
        return new.number(attributes["scale"], q)
    width = given.shape[-1] if given is not None and given.shape is not None else None
    if isinstance(width, int):
        heads = attributes.get("q_num_heads", 1) if given is not None and _is_merged(given, attributes) else 1
        return new.number((width // heads) ** -0.5, q)
    width_of_head = new("Squeeze", new("Cast", new.dims(q, 3, 4), to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT))
    return new.cast_like(new("Reciprocal", new("Sqrt", width_of_head)), q)


def _capped(new: Replacement, scores: ir.Value, cap: float) -> ir.Value:
    if not cap:
        return scores
    limit = new.number(cap, scores)
    return new("Mul", new("Tanh", new("Div", scores, limit)), limit)


def _masked(new: Replacement, scores: ir.Value, mask: ir.Value) -> ir.Value:
    if mask.dtype is None:
        raise UsageError(
            "the type of an attention's mask must be known to spell it out",
            received=f"the mask {mask.name}",
            fix="run ONNX's shape inference on the model first",
        )
    if mask.dtype != ir.DataType.BOOL:
        return new("Add", scores, mask)
    masked = new("Where", mask, scores, new.number(_NEVER, scores))
    masked.type = scores.type
    return masked


def _earlier(new: Replacement, q: ir.Value, k: ir.Value, past_k: ir.Value | None) -> ir.Value:
    """True where a key is not later than the query: as many more as there were keys before."""
    shape = new("Concat", new.dims(q, 2, 3), new.dims(k, 2, 3), axis=0)
    ones = new("ConstantOfShape", shape, value=ir.tensor([1], dtype=ir.DataType.INT32), dtype=ir.DataType.INT32)
    before = None if past_k is None else new("Squeeze", new.dims(past_k, 2, 3))
    return new("Cast", new("Trilu", ones, before, upper=0), to=ir.DataType.BOOL, dtype=ir.DataType.BOOL)


def _softmax(new: Replacement, scores: ir.Value, attributes: dict[str, Any], *, guarded: bool) -> ir.Value:
    precision = attributes.get("softmax_precision", 0)
    exact = new.cast(scores, ir.DataType(precision)) if precision else scores
    softmax = new("Softmax", exact, axis=-1)
    if guarded:
        empty = new("IsNaN", softmax, dtype=ir.DataType.BOOL)
        nothing = new.number(0.0, softmax)
        guarded_softmax = new("Where", empty, nothing, softmax)
        guarded_softmax.type = softmax.type
        softmax = guarded_softmax
    return new.cast_like(softmax, scores) if precision else softmax


attention: Pass = Pass("attention spelled out", _spell_out)
