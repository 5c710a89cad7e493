"""How norms are spelled out: something over the root of the mean of its squares, plus epsilon.

    x / √(mean(x²) + ε)      x · 1/√(mean(x²) + ε)      x · (mean(x²) + ε)^−½

Functions that read return None where a value is something else altogether, and raise `MatchFailureError` with a reason
at a near miss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError

from mmdit_deploy.graph.fuse.known_values import known, number
from mmdit_deploy.graph.fuse.token_shapes import may_be_equal
from mmdit_deploy.graph.passes import like

_MEANS = ("ReduceMean", "ReduceSum", "ReduceSumSquare")
# The ops compute in fp32 inside, whatever their input's type: `stash_type` 1, the only one that ONNX's own evaluator
# has; ONNX Runtime ignores the others. A norm that was spelled out in a 16-bit type, as TorchScript writes PyTorch's
# own, thus becomes more exact, as PyTorch's is. A norm in fp64 would not.
STASH = int(ir.DataType.FLOAT)
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WIDER = {
    **dict.fromkeys(HALF, (ir.DataType.FLOAT, ir.DataType.DOUBLE)),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}
_LEAST_EPSILON = 1e-9  # 1/√ε is finite in fp16
_INSIDE = tuple("Add Cast Div Expand Identity Mul Pow Reciprocal Reshape Sqrt Sub Unsqueeze".split())


@dataclass(frozen=True)
class MeanSquare:
    """mean(x²) + ε.

    Args:
        x: what is squared.
        axis: the first of those that the mean is over, counted from the end; they are the last ones.
        epsilon: the number added.
    """

    x: ir.Value
    axis: int
    epsilon: float


def quotient(op: Any, x: Any, other: Any) -> Any:
    """A pattern: x / √…"""
    return op.Div(x, other, _outputs=["normed"])


def product(op: Any, x: Any, other: Any) -> Any:
    """A pattern: x · 1/√…"""
    return op.Mul(x, other, _outputs=["normed"])


def product_swapped(op: Any, x: Any, other: Any) -> Any:
    """A pattern: 1/√… · x"""
    return op.Mul(other, x, _outputs=["normed"])


SPELLINGS = (quotient, product, product_swapped)


def under_root(normed: ir.Value, other: ir.Value) -> ir.Value | None:
    """What is under the root that `normed` was divided by, or whose reciprocal it was multiplied by."""
    node = normed.producer()
    if node is not None and node.op_type == "Div":
        return _of_root(other) if number(node.inputs[0]) is None else None  # 1/√… is no norm yet
    inverse = made_by(uncast(other), "Reciprocal", "Div", "Pow")
    if inverse is None:
        return None
    if inverse.op_type == "Reciprocal":
        return _of_root(inverse.inputs[0])
    base, last = inverse.inputs
    if inverse.op_type == "Div":
        return _of_root(last) if number(base) == 1 else None
    return base if number(last) == -0.5 else None


def mean_square(under: ir.Value, x: ir.Value) -> MeanSquare | None:
    """Read mean(x²) + ε.

    Args:
        under: the sum.
        x: what it is of, or should be.
    """
    add = made_by(under, "Add")
    if add is None:
        if (mean := _of_squares(under)) is not None:
            raise MatchFailureError("no epsilon is added to the mean square", mean)
        return None
    for value, epsilon in (add.inputs, reversed(add.inputs)):
        if value is None or (mean := _of_squares(value)) is None:
            continue
        squared = _square(mean.inputs[0])
        if mean.op_type != "ReduceMean" or squared is None:
            raise MatchFailureError("a sum of squares, not their mean", mean)
        eps = number(epsilon)
        if eps is None:
            raise MatchFailureError("epsilon is not one constant", add)
        return MeanSquare(squared, last_axes(mean, value, x), eps)
    return None


def mean_of(value: ir.Value | None) -> ir.Node | None:
    """The node that takes a mean or a sum, before casts, and before the reshapes that give it its axes back."""
    while (move := made_by(value, "Cast", "Expand", "Identity", "Reshape", "Unsqueeze")) is not None:
        before = move.inputs[0]
        if move.op_type not in ("Cast", "Identity") and not _same_but_for_ones(before, value):
            break
        value = before
    return made_by(value, *_MEANS)


def last_axes(mean: ir.Node, value: ir.Value, x: ir.Value) -> int:
    """The first axis, counted from the end, of a mean over the last ones.

    Args:
        mean: what `mean_of` found.
        value: the mean with its axes, as it meets x.
        x: what it is of.
    """
    within = mean.inputs[0].shape if mean.inputs[0] is not None else None
    sizes = list(x.shape or ())
    rank = len(sizes)
    if not rank or within is None:
        raise MatchFailureError("the number of axes is not known", mean)
    if len(within) != rank:
        raise MatchFailureError("a constant adds axes before the mean", mean)
    if len(mean.inputs) < 2 or mean.inputs[1] is None:
        raise MatchFailureError("the mean is over all axes", mean)
    over = known(mean.inputs[1])
    if over is None:
        raise MatchFailureError("the axes of the mean are not constant", mean.inputs[1])
    axes = sorted({int(axis) % rank - rank for axis in over.flat})
    if not axes or axes != list(range(-len(axes), 0)):
        raise MatchFailureError("the mean is not over the last axes", mean)
    keepdims = mean.attributes.get("keepdims")
    kept = keepdims is None or (not keepdims.is_ref() and bool(keepdims.as_int()))
    ones_last = [*sizes[: axes[0]], *[1] * len(axes)]
    named = all(isinstance(size, int) or size.value is not None for size in sizes)
    reshaped = named and value.shape is not None and list(value.shape) == ones_last
    if not (reshaped or (kept and made_by(uncast(value), *_MEANS) is mean)):
        raise MatchFailureError("the mean drops its axes", mean)
    return axes[0]


def keeps_numbers(source: ir.Value, x: ir.Value, other: ir.Value, epsilon: float) -> None:
    """Raise where something loses numbers on the way: what fp16 has not is infinite there, and no norm has it so.

    Args:
        source: what is normalized.
        x: what is divided.
        other: what x is divided by or multiplied by. It may be rounded to x's own type in the end, as some exporters
            have it: no root of squares of 16-bit numbers is too large for their type, and no reciprocal but for ε's.
        epsilon: ε.
    """
    last = made_by(other, "Cast")
    if last is not None and x.dtype in HALF and other.dtype == x.dtype and epsilon >= _LEAST_EPSILON:
        todo = [x, last.inputs[0]]
    else:
        todo = [x, other]
    seen = {source, _widened(source)}
    while todo:
        value = todo.pop()
        node = made_by(value, *_INSIDE, *_MEANS) if value not in seen else None
        seen.add(value)
        if node is None:
            continue
        if node.op_type == "Cast" and not is_widening(node) and known(node.inputs[0]) is None:
            raise MatchFailureError(f"it is rounded to {_type_name(node.outputs[0])} inside", node)
        todo += node.inputs


def _type_name(value: ir.Value) -> str:
    return value.dtype.name if value.dtype else "an unknown type"


def keeps_shape(normed: ir.Value, x: ir.Value) -> None:
    """Raise where the result has another shape than x: a constant of one element may have more axes."""
    if normed.shape is None or x.shape is None:
        raise MatchFailureError("the number of axes is not known", normed)
    if len(normed.shape) != len(x.shape):
        raise MatchFailureError("a constant adds axes", normed)
    if not all(map(may_be_equal, normed.shape, x.shape)):
        raise MatchFailureError("the result is larger than what is normalized", normed)


def normalized_shape(x: ir.Value, axis: int) -> list[int]:
    """The sizes of the axes that x is normalized over; its type must be one that the ops compute in."""
    if x.dtype not in (ir.DataType.FLOAT, *HALF):
        raise MatchFailureError(f"computed in {_type_name(x)}", x)
    sizes = [] if x.shape is None else list(x.shape[axis:])
    static = [size for size in sizes if isinstance(size, int)]
    if not sizes or len(static) < len(sizes):
        raise MatchFailureError("the size of the normalized axes is not known", x)
    return static


def ones(op: Any, x: ir.Value, shape: list[int]) -> Any:
    """A weight of ones for x, made in the graph or function where it is used."""
    assert x.dtype is not None
    return like(op.Constant(value=ir.tensor(np.ones(shape, x.dtype.numpy()), dtype=x.dtype)), x, shape)


def made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes a value, if it is one of ONNX's ops named."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in ops else None


def uncast(value: ir.Value | None) -> ir.Value | None:
    """A value before any casts between floating-point types."""
    while (cast := made_by(value, "Cast", "Identity")) is not None:
        before = cast.inputs[0]
        if before is None or before.dtype is None or not before.dtype.is_floating_point():
            break
        value = before
    return value


def same(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are the same numbers: one value, or one that was cast more than once, to no smaller type."""
    return _widened(one) is _widened(other)


def _widened(value: ir.Value | None) -> ir.Value | None:
    """A value before the casts that keep its numbers."""
    while (cast := made_by(value, "Cast", "Identity")) is not None:
        before = cast.inputs[0]
        if cast.op_type == "Cast" and not is_widening(cast):
            break
        value = before
    return value


def is_widening(cast: ir.Node) -> bool:
    """Whether a cast keeps every number: to the same type, or to a wider one."""
    (before,), (after,) = cast.inputs, cast.outputs
    if before is None or before.dtype is None:
        return False
    return before.dtype == after.dtype or after.dtype in _WIDER.get(before.dtype, ())


def _of_root(value: ir.Value | None) -> ir.Value | None:
    root = made_by(uncast(value), "Sqrt", "Pow", "Add")
    if root is None or (root.op_type == "Pow" and number(root.inputs[1]) != 0.5):
        return None
    if root.op_type == "Add":
        roots = [node for v in root.inputs if (node := made_by(v, "Sqrt")) is not None]
        if any(_of_squares(node.inputs[0]) is not None for node in roots):
            raise MatchFailureError("epsilon is added to the root, not under it", root)
        return None
    return root.inputs[0]


def _of_squares(value: ir.Value | None) -> ir.Node | None:
    """The mean or sum of squares that a value is."""
    mean = mean_of(value)
    squares = mean is not None and (mean.op_type == "ReduceSumSquare" or _square(mean.inputs[0]) is not None)
    return mean if squares else None


def _same_but_for_ones(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values of different shapes hold the same elements in the same order."""
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    sizes = [[size for size in v.shape if size != 1] for v in (one, other) if v.shape is not None]
    return sizes[0] == sizes[1]


def _square(value: ir.Value | None) -> ir.Value | None:
    """What is squared: x in x² or x·x."""
    node = made_by(uncast(value), "Pow", "Mul")
    if node is None:
        return None
    base, last = node.inputs
    if node.op_type == "Mul":
        return base if same(base, last) else None
    return base if number(last) == 2 else None
