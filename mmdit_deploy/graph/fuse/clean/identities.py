"""Nodes that change nothing.

    Identity(x), Cast(x) to its own type, x · 1, x + 0, Dropout(x) without training,
    Reshape, Expand, Slice, Transpose, Tile, Concat or Pad to what x already is       ⇒   x

Only where nothing is lost: a product with a 1 of more axes than x has changes its shape. Whether a zero keeps its sign
is the one thing that is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY

from mmdit_deploy.graph.fuse.clean.rewire import every_node, is_plain, replace, small_constant
from mmdit_deploy.graph.passes import Pass


def _remove(model: ir.Model) -> int:
    count = 0
    for node in every_node(model):
        kept = _SAME[node.op_type](node) if node.op_type in _SAME and is_plain(node) and node.inputs else None
        count += kept is not None and replace(node, kept)
    return count


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _elements(value: ir.Value | None) -> list[float] | None:
    tensor = small_constant(value)
    return None if tensor is None else np.atleast_1d(tensor.numpy()).tolist()


def _first(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _dropout(node: ir.Node) -> ir.Value | None:
    training = _input(node, 2)
    return node.inputs[0] if training is None or _elements(training) == [False] else None


def _cast(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    to = node.attributes.get_int("to", 0)
    return x if x is not None and x.dtype is not None and x.dtype.value == to else None


def _cast_like(node: ir.Node) -> ir.Value | None:
    x, like = node.inputs
    return x if x is not None and like is not None and x.dtype is not None and x.dtype == like.dtype else None


def _neutral(number: float, *, either_side: bool) -> Callable[[ir.Node], ir.Value | None]:
    def same(node: ir.Node) -> ir.Value | None:
        a, b = node.inputs
        if b is not None and _elements(b) == [number] and _adds_no_axis(b, a):
            return a
        return b if either_side and a is not None and _elements(a) == [number] and _adds_no_axis(a, b) else None

    return same


def _adds_no_axis(number: ir.Value, x: ir.Value | None) -> bool:
    tensor = small_constant(number)
    rank = 1 if tensor is None else len(tensor.shape)
    return rank == 0 or (x is not None and x.shape is not None and len(x.shape) >= rank)


def _alike(x: ir.Value | None, y: ir.Value) -> bool:
    """Whether two values are known to be of one shape: every dim by number or by name."""
    if x is None or x.shape is None or y.shape is None or len(x.shape) != len(y.shape):
        return False
    named = all(isinstance(dim, int) or dim.value is not None for dim in x.shape)
    return named and list(x.shape) == list(y.shape)


def _same_shape(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if _alike(node.inputs[0], node.outputs[0]) else None


def _expand(node: ir.Node) -> ir.Value | None:
    """The shape itself is asked, too: of two names for a dim inference takes one, though they may differ."""
    x, shape = node.inputs
    if x is None or x.shape is None or shape is None or not _alike(x, node.outputs[0]):
        return None
    known: list[object] | None = _elements(shape)  # type: ignore[assignment]
    if known is None and SYM_DATA_KEY in shape.metadata_props:
        known = json.loads(shape.metadata_props[SYM_DATA_KEY])
    if known is None or len(known) > len(x.shape):
        return None
    dims = list(x.shape)[len(x.shape) - len(known) :]
    return x if all(want == 1 or dim == want for dim, want in zip(dims, known, strict=True)) else None


def _slice(node: ir.Node) -> ir.Value | None:
    steps = _input(node, 4)
    forward = steps is None or set(_elements(steps) or [0]) == {1}
    return node.inputs[0] if forward and _alike(node.inputs[0], node.outputs[0]) else None


def _transpose(node: ir.Node) -> ir.Value | None:
    perm = node.attributes.get("perm")
    return node.inputs[0] if perm is not None and list(perm.as_ints()) == sorted(perm.as_ints()) else None


def _all_are(number: float, index: int) -> Callable[[ir.Node], ir.Value | None]:
    def same(node: ir.Node) -> ir.Value | None:
        elements = _elements(_input(node, index))
        return node.inputs[0] if elements is not None and set(elements) <= {number} else None

    return same


def _only(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


# By op: the input that its output is the same as, or None.
_SAME: Mapping[str, Callable[[ir.Node], ir.Value | None]] = {
    "Add": _neutral(0, either_side=True),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _only,
    "Div": _neutral(1, either_side=False),
    "Dropout": _dropout,
    "Expand": _expand,
    "Identity": _first,
    "Mul": _neutral(1, either_side=True),
    "Pad": _all_are(0, 1),
    "Reshape": _same_shape,
    "Slice": _slice,
    "Sub": _neutral(0, either_side=False),
    "Tile": _all_are(1, 1),
    "Transpose": _transpose,
}

identities: Pass = Pass("identities", _remove)
