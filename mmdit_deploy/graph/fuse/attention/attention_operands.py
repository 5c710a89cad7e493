"""The operands of Q · Kᵀ and of probabilities · V, from MatMul or Einsum, with what only moves or scales them.

MatMul(Mul(q, 0.35), Mul(Transpose(k), 0.35))   reads as   q, k, 0.35 · 0.35
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError

from mmdit_deploy.graph.fuse.attention.einsum import Perm, product_perms
from mmdit_deploy.graph.fuse.attention.heads import LAST_TWO, Dim, before_merging, dims_of, perm_of, same_dims
from mmdit_deploy.graph.fuse.known_values import number
from mmdit_deploy.graph.passes import like


@dataclass(frozen=True)
class Operand:
    """A value with a shape, still to be transposed.

    Args:
        value: of the graph.
        perm: of its axes; none where it is as it should be.
        scale: by which the graph multiplied it.
    """

    value: ir.Value
    perm: Perm = ()
    scale: float = 1.0

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Its shape, transposed."""
        dims = dims_of(self.value)
        return tuple(dims[axis] for axis in self.perm) if self.perm else dims

    def transposed(self, perm: Sequence[int]) -> Operand:
        """Transposed once more; back to where it came from is no transpose."""
        return replace(self, perm=_unless_identity([self.perm[axis] for axis in perm] if self.perm else perm))

    def write(self, op: Any) -> ir.Value:
        """The value, with a transpose where it needs one; without its scale."""
        return like(op.Transpose(self.value, perm=self.perm), self.value, self.dims) if self.perm else self.value


def is_product(node: ir.Node) -> bool:
    """Whether a node is a product of two."""
    return node.domain == "" and node.op_type in ("MatMul", "Einsum") and len(node.inputs) == 2


def product_operands(node: ir.Node) -> tuple[Operand, Operand]:
    """A and B, of a product A · Bᵀ of stacks of matrices, without what scaled or transposed them.

    Raises:
        MatchFailureError: it is another product.
    """
    a, b = (v for v in node.inputs if v is not None)
    if a.shape is None or b.shape is None:
        raise MatchFailureError("the shapes of Q and K are not known", node)
    rank = len(a.shape)
    if len(b.shape) != rank or rank not in LAST_TWO:
        raise MatchFailureError("the product is not one of Q and K with a batch, and heads or not", node)
    if node.op_type == "MatMul":
        return as_it_was(Operand(a)), as_it_was(Operand(b).transposed(LAST_TWO[rank]))
    perms = product_perms(node, "bhnd,bhmd->bhnm")
    if perms is None or _unless_identity(perms[2]):
        raise MatchFailureError("the product is not Q · Kᵀ", node)
    return as_it_was(Operand(a).transposed(perms[0])), as_it_was(Operand(b).transposed(perms[1]))


def attended_operand(node: ir.Node) -> tuple[Operand, Perm]:
    """Of probabilities · V the V, and the perm that brings (B, H, N, D) to the result; none where it is that.

    Raises:
        MatchFailureError: it is another product.
    """
    v = node.inputs[1]
    assert v is not None
    if v.shape is None:
        raise MatchFailureError("the shape of V is not known", v)
    if node.op_type == "MatMul":
        return Operand(v), ()
    perms = product_perms(node, "bhnm,bhmd->bhnd")
    if perms is None or _unless_identity(perms[0]):
        raise MatchFailureError("the product is not probabilities · V", node)
    back = [perms[2].index(axis) for axis in range(len(perms[2]))]
    return Operand(v).transposed(perms[1]), _unless_identity(back)


def as_it_was(operand: Operand) -> Operand:
    """Before scales and transposes: these are taken along."""
    while (node := operand.value.producer()) is not None and node.domain == "":
        before = _before(operand, node)
        if before is None or before.value.shape is None:
            return operand
        operand = before
    return operand


def _before(operand: Operand, node: ir.Node) -> Operand | None:
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return None
    if node.op_type == "Identity":
        return replace(operand, value=first)
    if node.op_type in ("Mul", "Div"):
        return _unscaled(operand, node)
    # A transpose of what is as it should be stays: the layout's rule looks at it.
    if operand.perm and len(perm_of(node)) == len(operand.perm):
        return replace(operand, value=first, perm=_unless_identity([perm_of(node)[axis] for axis in operand.perm]))
    if operand.perm == LAST_TWO[4] and node.op_type == "Reshape":
        return _transposed_as_3d(operand, first)
    return None


def _unscaled(operand: Operand, node: ir.Node) -> Operand | None:
    value, scale = scaled_by(node)
    if value is None or value.shape is None or len(value.shape) != len(operand.dims):
        return None
    return replace(operand, value=value, scale=operand.scale * scale)


def scaled_by(node: ir.Node) -> tuple[ir.Value | None, float]:
    """What a Mul or Div scales by one known number, and that number; nothing where it does not."""
    first, second = node.inputs
    scale = number(second)
    if scale is None and node.op_type == "Mul":
        first, second = second, first
        scale = number(second)
    if not scale:  # and not by 0
        return None, 1.0
    return first, scale if node.op_type == "Mul" else 1 / scale


def _transposed_as_3d(operand: Operand, reshaped: ir.Value) -> Operand | None:
    """Reshape(Transpose(Reshape(k [B, H, N, D] → [B·H, N, D])) → [B, H, D, N]), as torch's exporter writes it: k."""
    transpose = reshaped.producer()
    if transpose is None or perm_of(transpose) != LAST_TWO[3] or transpose.inputs[0] is None:
        return None
    k = before_merging(transpose.inputs[0])
    if k is None or not same_dims([dims_of(k)[axis] for axis in (1, 3, 2)], dims_of(operand.value)[1:]):
        return None
    return replace(operand, value=k, perm=())


def _unless_identity(perm: Sequence[int]) -> Perm:
    return () if tuple(perm) == tuple(range(len(perm))) else tuple(perm)
