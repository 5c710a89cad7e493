"""Scaled dot product attention, as one op.

    MatMul(Softmax(scale · MatMul(Q, Transpose(K)) + mask), V)   ⇒   Attention(Q, K, V, mask, scale)

The scale may be a product or a quotient, of the scores, of Q, of K or of both, from a constant or from a shape; a mask
is added, or says which scores are replaced by a big negative number; K is transposed by any spelling. Q, K and V are
(B, H, N, D), also where the products are of (B·H, N, D); without heads they are (B, N, D), and one head. Heads of K and
V that are repeated for groups of Q's are not: the op does that.

In half precision no ``softmax_precision`` is written, also where the graph casts the scores to fp32 and back. By ONNX's
word the softmax is then in half precision; but TensorRT-RTX refuses the attribute, and what fuses an attention at all
has its softmax in fp32: TensorRT and ONNX Runtime do, and torch exports its own op so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.attention.attention_op import SpelledOut, apart_mask, write_attention
from mmdit_deploy.graph.fuse.attention.attention_operands import Operand, as_it_was, attended_operand
from mmdit_deploy.graph.fuse.attention.attention_scores import (
    Mask,
    Scores,
    check_adds_no_axis,
    check_regrouped,
    read_scores,
    readers_outside,
)
from mmdit_deploy.graph.fuse.attention.einsum import Perm
from mmdit_deploy.graph.fuse.attention.heads import (
    HEADS_AND_TOKENS,
    before_merging,
    before_sharing,
    perm_of,
    same_dims,
)
from mmdit_deploy.graph.fuse.known_values import known, number
from mmdit_deploy.graph.passes import Pass, rule_pass

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_DEEPEST = 3  # nodes between the softmax and its product with V


class _Sdpa(RewriteRuleClassBase):
    def __init__(self) -> None:
        # Q, K and V may have more readers, which may read what was scaled or transposed.
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, scores: Any, v: Any) -> Any:
        return op.MatMul(_probabilities(op, scores), v, _outputs=["attended"])

    def check(self, op: Any, attended: Any, **_: Any) -> MatchResult:
        _read(attended)
        return MatchResult()

    def rewrite(self, op: Any, attended: Any, **_: Any) -> Any:
        return write_attention(op, _read(attended))


class _EinsumSdpa(_Sdpa):
    def pattern(self, op: Any, scores: Any, v: Any) -> Any:
        probabilities = _probabilities(op, scores)
        return op.Einsum(probabilities, v, _allow_other_attributes=True, _outputs=["attended"])


def _probabilities(op: Any, scores: Any) -> Any:
    """A softmax, and what changes nothing of it."""
    softmax = op.Softmax(scores, _allow_other_attributes=True)
    passed = pattern.OrValue([op.Where(pattern.ANY_VALUE, pattern.ANY_VALUE, softmax), softmax])
    for _ in range(_DEEPEST):
        others = (op.Cast(passed, _allow_other_attributes=True), op.Identity(passed))
        reshaped = op.Reshape(passed, pattern.ANY_VALUE, _allow_other_attributes=True)
        dropped = op.Dropout(passed, _allow_other_inputs=True, _allow_other_attributes=True)
        passed = pattern.OrValue([*others, reshaped, dropped, passed])
    return passed


def _read(attended: ir.Value) -> SpelledOut:
    product = attended.producer()
    assert product is not None
    softmax, passed = _softmax(product)
    scores = read_scores(_input(softmax, 0))
    for value in readers_outside([*passed, softmax, *scores.nodes], product):
        raise MatchFailureError("others read the scores or the probabilities too", value)
    v, perm = attended_operand(product)
    _check_types(scores.q, scores.k, v)
    return _with_heads(scores, v, perm)


def _softmax(product: ir.Node) -> tuple[ir.Node, list[ir.Node]]:
    """The softmax of the pattern, and the nodes between it and its product with V."""
    passed: list[ir.Node] = []
    node = _input(product, 0).producer()
    while node is not None and node.op_type != "Softmax":
        passed.append(node)
        if node.op_type == "Where":
            passed.append(_check_guard(node))
        if node.op_type == "Reshape":
            check_regrouped(node)
        if node.op_type == "Dropout" and not _is_in_eval(node):
            raise MatchFailureError("dropout in training", node)
        node = _input(node, 2 if node.op_type == "Where" else 0).producer()
    assert node is not None
    shape = _input(node, 0).shape
    last = -1 if shape is None else len(shape) - 1
    if node.attributes.get_int("axis", -1) not in (-1, last):
        raise MatchFailureError("the softmax is not over the keys, the last axis", node)
    return node, passed


def _is_in_eval(dropout: ir.Node) -> bool:
    mode = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    training = None if mode is None else known(mode)
    return mode is None or (training is not None and not training.any())


def _check_guard(where: ir.Node) -> ir.Node:
    """The IsNaN of Where(IsNaN(p), 0, p): a row that is all masked gets zeros, and so it does of the op."""
    condition, fill, probabilities = where.inputs
    guard = None if condition is None else condition.producer()
    if guard is None or guard.op_type != "IsNaN" or guard.inputs[0] is not probabilities or number(fill) != 0:
        raise MatchFailureError("probabilities are replaced after the softmax", where)
    check_adds_no_axis(where, _input(where, 2))
    return guard


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _check_types(*operands: Operand) -> None:
    types = {operand.value.dtype for operand in operands}
    if len(types) > 1:
        raise MatchFailureError("Q, K and V are not of one type", *(o.value for o in operands))
    if not types.issubset(_TYPES):
        # In fp64 the op would have a scale of 32 bits, and no runtime has a kernel.
        raise MatchFailureError(f"Q, K and V are {types.pop()}", operands[0].value)


def _with_heads(scores: Scores, v: Operand, perm: Perm) -> SpelledOut:
    """Batch and heads each on an axis of their own, where that is how Q, K and V came, and the masks allow it."""
    ranks = [len(operand.dims) for operand in (scores.q, scores.k, v)]
    if ranks not in ([3, 3, 3], [4, 4, 4]):
        raise MatchFailureError("Q, K and V have unlike axes", scores.product)
    q4, k4, v4 = (None if perm else _apart(operand) for operand in (scores.q, scores.k, v))
    if q4 is not None and k4 is not None and v4 is not None and all(_fits(mask, q4) for mask in scores.masks):
        return _checked(as_it_was(q4), as_it_was(k4), v4, scores, merged=scores.q.dims[0])
    for mask in scores.masks:
        if not _fits(mask, scores.q):
            raise MatchFailureError("the mask is of other heads than Q, K and V", mask.value)
    return _checked(scores.q, scores.k, v, scores, perm=perm)


def _apart(operand: Operand) -> Operand | None:
    """(B, H, N, D) of (B·H, N, D)."""
    before = None if operand.perm else before_merging(operand.value)
    return None if before is None else replace(operand, value=before)


def _fits(mask: Mask, q: Operand) -> bool:
    """Whether a mask can be added to the scores of Q with its heads as they are."""
    if len(mask.scores) == 4:
        return len(q.dims) == 4 and same_dims(mask.scores[1:2], q.dims[1:2])
    return len(q.dims) == 3 or apart_mask(mask) is not None


def _checked(q: Operand, k: Operand, v: Operand, scores: Scores, **form: Any) -> SpelledOut:
    if not all(same_dims(q.dims[:1], operand.dims[:1]) for operand in (k, v)):
        raise MatchFailureError("Q, K and V have unlike batches", q.value, k.value, v.value)
    if len(q.dims) == 4:
        # One head of K and V for all of Q's is what a product makes of it too.
        if not same_dims(k.dims[1:2], v.dims[1:2]) or not (k.dims[1] == 1 or same_dims(q.dims[1:2], k.dims[1:2])):
            raise MatchFailureError("Q, K and V have unlike heads", q.value, k.value, v.value)
    elif not all(isinstance(operand.dims[-1], int) for operand in (q, k, v)):
        raise MatchFailureError("the width of the one head is not known", q.value)
    scale = scores.factor * q.scale * k.scale
    if not scale > 0:
        raise MatchFailureError(f"the scale is {scale:g}, and ONNX Runtime's op takes none below 0", scores.product)
    k, v = _unshared(k, v)
    return SpelledOut(q, k, v, scale, scores.masks, **form)


def _unshared(k: Operand, v: Operand) -> tuple[Operand, Operand]:
    """K and V before their heads were repeated for groups of Q's."""
    before = [_before_sharing(operand) for operand in (k, v)]
    if before[0] is None or before[1] is None or not same_dims(before[0].dims[1:2], before[1].dims[1:2]):
        return k, v
    return before[0], before[1]


def _before_sharing(operand: Operand) -> Operand | None:
    value, perm, transpose = operand.value, operand.perm, operand.value.producer()
    if not perm and transpose is not None and perm_of(transpose) == HEADS_AND_TOKENS:
        value, perm = _input(transpose, 0), HEADS_AND_TOKENS
    if len(operand.dims) != 4 or perm not in ((), HEADS_AND_TOKENS):
        return None
    before = before_sharing(value, axis=2 if perm else 1)
    return None if before is None else replace(operand, value=before, perm=perm)


sdpa: Pass = rule_pass("attention", _Sdpa.rule(), _EinsumSdpa.rule())
