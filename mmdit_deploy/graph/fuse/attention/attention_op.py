"""Write an Attention for what a graph spells out, in the op's own terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mmdit_deploy.graph.fuse.attention.attention_mask import as_type, constant, ints
from mmdit_deploy.graph.fuse.attention.attention_operands import Operand
from mmdit_deploy.graph.fuse.attention.attention_scores import Mask
from mmdit_deploy.graph.fuse.attention.einsum import Perm
from mmdit_deploy.graph.fuse.attention.heads import Dim, before_merging, broadcast, dims_of
from mmdit_deploy.graph.passes import like

# What a finite fill becomes, which replaced the scores and is now added to them: so far down that in fp32 and bf16 no
# score is left of the sum, and a row that is all masked has equal probabilities. Two of them are still finite.
_FAR = -1e30


@dataclass(frozen=True)
class SpelledOut:
    """An attention that a graph spells out.

    Args:
        q, k, v: (B, H, N, D), or (B, N, D).
        scale: of Q · Kᵀ.
        masks: all are added.
        perm: of the result, where it is not as the op gives it.
        merged: B·H, where the graph's result has batch and heads in one axis, and `q`, `k` and `v` do not.
    """

    q: Operand
    k: Operand
    v: Operand
    scale: float
    masks: Sequence[Mask]
    perm: Perm = ()
    merged: Dim | None = None


def write_attention(op: Any, read: SpelledOut) -> ir.Value:
    """The op, and what brings its result to the graph's axes."""
    q, k, v = (operand.write(op) for operand in (read.q, read.k, read.v))
    *rows, width = read.q.dims
    attributes: dict[str, Any] = {} if len(rows) == 3 else {"q_num_heads": 1, "kv_num_heads": 1}
    if not isinstance(width, int) or not math.isclose(read.scale, width**-0.5, rel_tol=1e-6):
        attributes["scale"] = read.scale
    masks = (_one_mask(op, read, q),) if read.masks else ()
    result: ir.Value = like(op.Attention(q, k, v, *masks, **attributes), q, [*rows, read.v.dims[-1]])
    if read.perm:
        result = op.Transpose(result, perm=read.perm)
    return result if read.merged is None else _merge_heads(op, result, read.merged)


def _merge_heads(op: Any, result_BHND: ir.Value, heads: Dim) -> ir.Value:
    """[B·H, N, D], as the graph had it."""
    shape = op.Concat(ints(op, [-1]), op.Shape(result_BHND, start=2, end=4), axis=0)
    return like(op.Reshape(result_BHND, shape), result_BHND, [heads, *dims_of(result_BHND)[2:]])


def apart_mask(mask: Mask) -> ir.Value | None:
    """A mask of (B, H, N, M) scores, of one that was added to (B·H, N, M)."""
    shape = mask.value.shape
    if shape is None or len(mask.scores) == 4 or len(shape) < 3 or shape[0] == 1:
        return mask.value
    return before_merging(mask.value)


def _one_mask(op: Any, read: SpelledOut, q: ir.Value) -> ir.Value:
    first, *rest = (_added_mask(op, mask, q, apart=len(read.q.dims) == 4) for mask in read.masks)
    for mask in rest:
        first = like(op.Add(first, mask), q, broadcast(dims_of(first), dims_of(mask)))
    return first


def _added_mask(op: Any, mask: Mask, q: ir.Value, *, apart: bool) -> ir.Value:
    """What to add to the op's scores, in their type."""
    value = apart_mask(mask) if apart else mask.value
    assert value is not None and q.dtype is not None
    dims = dims_of(value)
    if mask.fill is not None:
        value = like(op.Where(value, *_sides(op, mask, q.dtype)), q, dims)
    else:
        value = as_type(op, value, q)
        if mask.factor != 1:
            value = like(op.Mul(value, constant(op, mask.factor, q.dtype)), q, dims)
    if not apart and len(dims) == 3:  # [B, N, M]: of one head
        value = like(op.Unsqueeze(value, ints(op, [1])), q, [dims[0], 1, *dims[1:]])
    return value


def _sides(op: Any, mask: Mask, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """What a condition adds where it holds, and where not."""
    assert mask.fill is not None
    fill = mask.fill if math.isinf(mask.fill) else max(_FAR, float(dtype.min))
    kept, masked = constant(op, 0.0, dtype), constant(op, fill, dtype)
    return (kept, masked) if mask.keeps else (masked, kept)
