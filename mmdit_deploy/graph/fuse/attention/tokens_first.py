"""(B, H, N, D) values as (B, N, H, D), the layout in which a projection gives them, without a transpose.

    Concat(RMSNormalization(Transpose(x)), RMSNormalization(Transpose(y)), axis=2)
    ⇒   Concat(RMSNormalization(x), RMSNormalization(y), axis=1)

A norm over the width, a concatenation of tokens, a cast or a product with one number per channel are the same in both.
What only this value needs is rewritten; where something else reads it too, it stays, and has to be transposed back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.fuse.attention.attention_mask import ints
from mmdit_deploy.graph.fuse.attention.heads import HEADS_AND_TOKENS, Dim, dims_of, perm_of
from mmdit_deploy.graph.fuse.known_values import known
from mmdit_deploy.graph.passes import like

_NORMS = ("RMSNormalization", "LayerNormalization")
_UNARY = ("Cast", "Identity", "Neg", "Tanh")
_BINARY = ("Add", "Div", "Mul", "Sub")

Write = Callable[[Any], ir.Value]


def tokens_first(value: ir.Value, readers: Sequence[ir.Node]) -> Write | None:
    """How to write a (B, H, N, D) value as (B, N, H, D); nothing where that takes a transpose.

    Args:
        readers: nodes that will read the new value: if others read the old one too, it would be made twice.
    """
    node = value.producer()
    if node is None or node.domain != "" or value.shape is None or len(value.shape) != 4:
        return None
    if perm_of(node) == HEADS_AND_TOKENS:
        source = _input(node, 0)
        return lambda op: source
    part = _part_of_packed(node, value)
    if part is not None:
        return part
    if value.is_graph_output() or any(user not in readers for user, _ in value.uses()) or len(node.outputs) > 1:
        return None
    return _turned(node, value) if node.op_type == "RotaryEmbedding" else _moved_over(node, value)


def transposed(value: ir.Value) -> Write:
    """How to write it with a transpose."""
    return lambda op: like(op.Transpose(value, perm=HEADS_AND_TOKENS), value, swapped(value))


def swapped(value: ir.Value) -> list[Dim]:
    """The shape of a value in the other layout."""
    return [dims_of(value)[axis] for axis in HEADS_AND_TOKENS]


def heads_merged(op: Any, value_BNHD: ir.Value, width: int, shape: ir.Value | None = None) -> ir.Value:
    """(B, N, H, D) as (B, N, H·D), which moves no data; where it was that before its heads were parted, that.

    Args:
        shape: the same for all of one width; made where it is not given.
    """
    reshape = value_BNHD.producer()
    before = None if reshape is None or reshape.op_type != "Reshape" else reshape.inputs[0]
    batch, tokens, *_ = dims_of(value_BNHD)
    if before is not None and before.shape is not None and dims_of(before) == (batch, tokens, width):
        return before
    merged = op.Reshape(value_BNHD, shape or merged_shape(op, width))
    return like(merged, value_BNHD, [batch, tokens, width])


def merged_shape(op: Any, width: int) -> ir.Value:
    """Of (B, N, H·D), for Reshape.

    The width is written out: where N is symbolic, ONNX's shape inference makes nothing of a -1, and of an Attention
    whose width is unknown it makes a wrong shape, with which ONNX Runtime refuses the graph.
    """
    return ints(op, [0, 0, width])


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _moved_over(node: ir.Node, value: ir.Value) -> Write | None:
    """The node, on inputs in the other layout."""
    attributes = dict(node.attributes)
    if node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (2, -2):
        attributes["axis"] = ir.AttrInt64("axis", 1)
        moved = set(range(len(node.inputs)))
    elif node.op_type in _BINARY and any(_per_channel([v]) for v in node.inputs):
        moved = {0 if _per_channel(node.inputs[1:]) else 1}
    elif node.op_type in _UNARY or (node.op_type in _NORMS and _is_over_width(node)):
        moved = {0}
    else:
        return None
    inputs = {i: tokens_first(_input(node, i), [node]) for i in moved}
    if None in inputs.values():
        return None

    def write(op: Any) -> ir.Value:
        given = [write(op) if (write := inputs.get(i)) else v for i, v in enumerate(node.inputs)]
        return like(getattr(op, node.op_type)(*given, **attributes), value, swapped(value))

    return write


def _is_over_width(norm: ir.Node) -> bool:
    return norm.attributes.get_int("axis", -1) in (-1, 3) and _per_channel(norm.inputs[1:])


def _turned(node: ir.Node, value: ir.Value) -> Write | None:
    """RotaryEmbedding, which takes (B, N, H·D) too."""
    x = tokens_first(_input(node, 0), [node])
    heads, width = dims_of(value)[1], dims_of(value)[3]
    if x is None or not isinstance(heads, int) or not isinstance(width, int):
        return None
    attributes = {**node.attributes, "num_heads": ir.AttrInt64("num_heads", heads)}

    def write(op: Any) -> ir.Value:
        merged = heads_merged(op, x(op), heads * width)
        turned = like(op.RotaryEmbedding(merged, *node.inputs[1:], **attributes), merged, dims_of(merged))
        return like(op.Reshape(turned, ints(op, [0, 0, heads, width])), turned, swapped(value))

    return write


def _per_channel(values: Sequence[ir.Value | None]) -> bool:
    """Whether values have one number, or one per channel, for all heads and tokens."""
    return all(v is None or (v.shape is not None and len(v.shape) <= 1) for v in values)


def _part_of_packed(node: ir.Node, value: ir.Value) -> Write | None:
    """Q, K or V of Transpose(x [B, N, 3, H, D] → [3, B, H, N, D]), picked from the first axis: picked from x."""
    index, source = _picked(node)
    transpose = None if source is None else source.producer()
    if index is None or transpose is None or perm_of(transpose) != (2, 0, 3, 1, 4):
        return None
    packed, at = _input(transpose, 0), ir.tensor(index, dtype=ir.DataType.INT64)
    return lambda op: like(op.Gather(packed, op.Constant(value=at), axis=2), value, swapped(value))


def _picked(node: ir.Node) -> tuple[int | None, ir.Value | None]:
    """Which slice of a value's first axis a node picks: Gather(x, i), Squeeze(Split(x)[i]), Squeeze(Slice(x, i))."""
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None, None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        return _only(known(node.inputs[1]), rank=0), source
    part = source.producer()
    if node.op_type != "Squeeze" or part is None or source.shape is None or source.shape[0] != 1:
        return None, None
    if len(node.inputs) < 2 or _only(known(node.inputs[1])) != 0:
        return None, None
    if part.op_type == "Split" and part.attributes.get_int("axis", 0) == 0:
        ones = all(o.shape is not None and o.shape[0] == 1 for o in part.outputs)
        return (source.index() if ones else None), part.inputs[0]
    if part.op_type == "Slice" and len(part.inputs) > 3 and _only(known(part.inputs[3])) == 0:
        return _only(known(part.inputs[1])), part.inputs[0]  # of one element, so of step and end nothing is left to ask
    return None, None


def _only(elements: np.ndarray[Any, Any] | None, rank: int | None = None) -> int | None:
    """The one element, counted from the start."""
    if elements is None or elements.size != 1 or rank not in (None, elements.ndim) or elements.min() < 0:
        return None
    return int(elements.min())
