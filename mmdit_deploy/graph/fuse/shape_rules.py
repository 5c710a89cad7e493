"""What shape inference does not know by itself, and exporters write all the time.

Slice(x [b, img + txt, c], img : ∞)      is [b, txt, c]        (a stream cut off behind an attention)
Slice(x [b, n, c], 0 : 100)              is [b, Min(100, n), c], and not 100 whatever n is
Where(Equal(shape, -1), ones, shape)     is known element by element (TorchScript's expand)
ConstantOfShape([b, n])                  is [b, n], where the shape is computed, too
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import onnx_ir as ir
from onnx_shape_inference import ShapeInferenceContext, check_inputs, registry

_Dim = int | ir.SymbolicDim
_END = 2**31 - 1  # exporters' "to the end" is this, or that of 64 bits


@functools.cache
def teach() -> None:
    """Register the rules, once a process, in place of the library's own."""
    registry.collect()
    where = registry.get("", "Where", version=23)
    assert where is not None
    registry.register("", "Slice", since_version=10)(_slice)
    registry.register("", "Where", since_version=9)(functools.partial(_where, where))
    registry.register("", "ConstantOfShape", since_version=9)(_constant_of_shape)


def _slice(ctx: ShapeInferenceContext, node: ir.Node) -> None:
    data, starts, ends = check_inputs(node, "data", "starts", "ends")
    out = node.outputs[0]
    if data.shape is None:
        if data.dtype is not None:
            ctx.set_dtype(out, data.dtype)
        return
    axes, steps = (_optional(ctx, node, index) for index in (3, 4))
    from_, to = ctx.get_symbolic_value(starts), ctx.get_symbolic_value(ends)
    count = next((len(known) for known in (from_, to, axes, steps) if known is not None), None)
    dims: list[_Dim] = list(data.shape)
    if axes is None and count is not None and len(node.inputs) < 4:
        axes = list(range(count))
    if count is None or axes is None or not all(isinstance(a, int) for a in axes):
        dims = [ctx.new_symbolic_dim() for _ in dims]
    else:
        for i, axis in enumerate(axes):
            assert isinstance(axis, int)
            step = 1 if len(node.inputs) < 5 or node.inputs[4] is None else None if steps is None else steps[i]
            known = None if from_ is None or to is None else _length(dims[axis], from_[i], to[i], step)
            dims[axis] = ctx.new_symbolic_dim() if known is None else known
    ctx.set_shape_and_dtype(out, ir.Shape(dims), data.dtype)
    elements = ctx.get_symbolic_value(data)
    if elements is not None and len(data.shape) == 1 and axes in ([0], [-1]) and from_ and to:
        step = 1 if steps is None else steps[0]
        if all(isinstance(bound, int) for bound in (from_[0], to[0], step)) and step != 0:
            ctx.set_symbolic_value(out, elements[from_[0] : to[0] : step])


def _optional(ctx: ShapeInferenceContext, node: ir.Node, index: int) -> Sequence[_Dim] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else ctx.get_symbolic_value(value)


def _length(dim: _Dim, start: _Dim, end: _Dim, step: _Dim | None) -> _Dim | None:
    """How much is left of an axis; None where that is not known."""
    if not isinstance(step, int) or step == 0:
        return None
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, end, step).indices(dim)))
    if step < 0:
        return None
    to_end = isinstance(end, int) and end >= _END
    if to_end and start == 0 and step == 1:
        return dim
    first = f"Max(0, ({dim}) + ({start}))" if isinstance(start, int) and start < 0 else f"Min({start}, {dim})"
    if to_end:
        last = f"{dim}"
    else:
        last = f"Max(0, ({dim}) + ({end}))" if isinstance(end, int) and end < 0 else f"Min({end}, {dim})"
    length = f"Max(0, ({last}) - ({first}))"
    return simplified(length if step == 1 else f"floor(({length} + {step - 1})/{step})")


@functools.lru_cache(maxsize=4096)
def simplified(text: str) -> _Dim:
    """A dim from an expression, in the form that equal ones share.

    Raises:
        ValueError: it is none.
    """
    dim = ir.SymbolicDim(text).simplify()
    return int(dim.value) if dim.value is not None and dim.value.isdecimal() else dim


def _where(otherwise: object, ctx: ShapeInferenceContext, node: ir.Node) -> None:
    """Choose element by element, where a comparison of shapes says which."""
    assert callable(otherwise)
    condition, x, y = check_inputs(node, "condition", "X", "Y")
    chosen = _compared(ctx, condition.producer())
    yes, no = ctx.get_symbolic_value(x), ctx.get_symbolic_value(y)
    if chosen is not None and yes is not None and no is not None and x.shape is not None and len(x.shape) == 1:
        count = max(len(chosen), len(yes), len(no))
        if all(len(part) in (1, count) for part in (chosen, yes, no)) and x.shape == y.shape:
            parts = [list(itertools.islice(itertools.cycle(part), count)) for part in (chosen, yes, no)]
            ctx.set_shape_and_dtype(node.outputs[0], ir.Shape([count]), x.dtype)
            ctx.set_symbolic_value(node.outputs[0], [a if c else b for c, a, b in zip(*parts, strict=True)])
            return
    otherwise(ctx, node)


def _constant_of_shape(ctx: ShapeInferenceContext, node: ir.Node) -> None:
    (shape,) = check_inputs(node, "input")
    value = node.attributes.get("value")
    dims = ctx.get_symbolic_value(shape)
    known = None if dims is None else ir.Shape(dims)
    ctx.set_shape_and_dtype(node.outputs[0], known, ir.DataType.FLOAT if value is None else value.as_tensor().dtype)


def _compared(ctx: ShapeInferenceContext, node: ir.Node | None) -> list[bool] | None:
    """What Equal says of two shapes, element by element: a dim is never negative."""
    if node is None or node.op_type != "Equal" or node.domain != "" or None in node.inputs:
        return None
    left, right = (ctx.get_symbolic_value(v) for v in node.inputs if v is not None)
    if left is None or right is None or (len(left) != len(right) and 1 not in (len(left), len(right))):
        return None
    count = max(len(left), len(right))
    pairs = list(zip(itertools.islice(itertools.cycle(left), count), itertools.cycle(right), strict=False))
    known = [_equal(a, b) for a, b in pairs]
    return None if None in known else [bool(k) for k in known]


def _equal(a: _Dim, b: _Dim) -> bool | None:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, ir.SymbolicDim) and isinstance(b, ir.SymbolicDim):
        return True if a == b else None
    number = a if isinstance(a, int) else b
    return False if isinstance(number, int) and number < 0 else None
