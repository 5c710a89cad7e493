"""Masks as every runtime takes them: added, of the type of Q, with four axes, and a row for every query.

    Attention(q, k, v, mask [B, 1, 1, M] bool)
    ⇒   Attention(q, k, v, Expand(Where(mask, 0, -inf), [B, 1, N, M]))

ONNX lets a mask broadcast over queries, keys and the axes that it lacks. ONNX Runtime's Attention does not do it over
queries and keys, and its fused one wants four axes. A bool mask costs TensorRT eight kernels more, and one of fp32 on
an op of fp16 fails. (`lower/mask_of_keys.py` takes the rows away again for TensorRT, which needs none.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.attention.heads import Dim, dims_of
from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _AttentionMask(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__()
        # What was made of a mask, by what it must be: all blocks of a model have one mask, and its rows are big.
        self._made: dict[tuple[ir.Value, str], ir.Value] = {}

    def setup(self) -> None:
        self._made.clear()

    def cleanup(self) -> None:
        self._made.clear()  # what a branch made, nothing outside can read

    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return op.Attention(q, k, v, mask, _allow_other_attributes=True, _outputs=["attended"])

    def check(self, op: Any, q: Any, k: Any, mask: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        for value in (q, k, mask):
            if value.shape is None or value.dtype is None:
                return result.fail("shape and type are not known", value)
        if mask.dtype == q.dtype and dims_of(mask) == _spelled_out_dims(q, k, mask):
            return result.fail()  # nothing to repair
        return result

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, mask: Any, attended: Any, **_: Any) -> Any:
        dims = _spelled_out_dims(q, k, mask)
        key = (mask, f"{q.dtype} {ir.Shape(dims)}")
        if key not in self._made:
            self._made[key] = _spelled_out(op, _with_four_axes(op, _added(op, mask, q), q), q, k, dims)
        return op.Attention(q, k, v, self._made[key], **attended.producer().attributes)


def _spelled_out_dims(q: ir.Value, k: ir.Value, mask: ir.Value) -> tuple[Dim, ...]:
    """The shape that a mask must have: its own, with four axes, and of all queries and keys."""
    dims = [*[1] * (4 - len(dims_of(mask))), *dims_of(mask)]
    for axis, tokens in ((2, q), (3, k)):
        if dims[axis] == 1:
            dims[axis] = dims_of(tokens)[-2]
    return tuple(dims)


def _added(op: Any, mask: ir.Value, q: ir.Value) -> ir.Value:
    assert q.dtype is not None
    if mask.dtype != ir.DataType.BOOL:
        return as_type(op, mask, q)
    kept, masked = constant(op, 0.0, q.dtype), constant(op, -math.inf, q.dtype)
    return like(op.Where(mask, kept, masked), q, dims_of(mask))


def _with_four_axes(op: Any, mask: ir.Value, q: ir.Value) -> ir.Value:
    missing = 4 - len(dims_of(mask))
    if not missing:
        return mask
    return like(op.Unsqueeze(mask, ints(op, range(missing))), q, [*[1] * missing, *dims_of(mask)])


def _spelled_out(op: Any, mask: ir.Value, q: ir.Value, k: ir.Value, dims: Sequence[Dim]) -> ir.Value:
    """The mask with a row for every query, and a number for every key."""
    if dims_of(mask) == tuple(dims):
        return mask
    sizes = [ints(op, [1, 1])]
    for axis, tokens in ((2, q), (3, k)):
        at = len(dims_of(tokens)) - 2
        stays = dims_of(mask)[axis] == dims[axis]
        size = 1 if stays else dims[axis]
        sizes.append(ints(op, [size]) if isinstance(size, int) else op.Shape(tokens, start=at, end=at + 1))
    return like(op.Expand(mask, op.Concat(*sizes, axis=0)), mask, dims)


def as_type(op: Any, mask: ir.Value, q: ir.Value) -> ir.Value:
    """A mask to add in the type of Q.

    The lowest number of fp32 becomes that of fp16, and not infinite. A high one becomes half of the highest: more of
    it makes no other key count, and a score can still be added.
    """
    assert q.dtype is not None and mask.dtype is not None
    if mask.dtype == q.dtype:
        return mask
    if float(mask.dtype.min) < float(q.dtype.min):
        bounds = (constant(op, bound, mask.dtype) for bound in (float(q.dtype.min), float(q.dtype.max) / 2))
        mask = like(op.Clip(mask, *bounds), mask, dims_of(mask))
    return like(op.Cast(mask, to=q.dtype), q, dims_of(mask))


def constant(op: Any, number: float, dtype: ir.DataType) -> ir.Value:
    """A scalar."""
    value: ir.Value = op.Constant(value=ir.tensor(number, dtype=dtype))
    value.dtype, value.shape = dtype, ir.Shape(())
    return value


def ints(op: Any, elements: Sequence[int]) -> ir.Value:
    """A shape, or axes."""
    value: ir.Value = op.Constant(value=ir.tensor(list(elements), dtype=ir.DataType.INT64))
    value.dtype, value.shape = ir.DataType.INT64, ir.Shape([len(elements)])
    return value


attention_mask: Pass = rule_pass("attention mask", _AttentionMask.rule())
