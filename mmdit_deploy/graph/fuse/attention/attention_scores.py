"""What a softmax is taken of: factor · Q · Kᵀ + masks, read from the softmax back to the product.

Softmax(Add(Mul(MatMul(Q, Kᵀ), 0.125), mask))   reads as   Q, Kᵀ, 0.125, mask
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError

from mmdit_deploy.graph.fuse.attention.attention_operands import Operand, is_product, product_operands, scaled_by
from mmdit_deploy.graph.fuse.attention.heads import Dim, same_dims, stretches
from mmdit_deploy.graph.fuse.known_values import is_zero, number

# A score of this or less, by type, is a mask, as no other score is near it; that one could be is not looked at.
# The op adds it, where the graph puts it in place of the scores. Where a row has keys that are not masked, that is
# the same. A row that is all masked has equal probabilities, and has them of the op too in fp32 and bf16
# (`attention_op._FAR`). In fp16 no number is that far away: of scores beyond ±16 something is left.
_MASKED = {ir.DataType.FLOAT: -1e9, ir.DataType.BFLOAT16: -1e9, ir.DataType.FLOAT16: -3e4}
_AS_THEY_ARE = ("Identity", "Cast", "Reshape")
_FLOATS = (*_MASKED, ir.DataType.DOUBLE)
_NEAR = 16  # nodes between a product and the softmax of its scores


@dataclass(frozen=True)
class Mask:
    """A value to add to the scores, or a condition under which they are.

    Args:
        value: what is added; of a condition, what is boolean.
        scores: the shape of what it meets; of three axes where batch and heads are one.
        factor: of the scores after it was added.
        fill: of a condition: the score of what is masked.
        keeps: of a condition: what it says of scores that are kept.
        dtype: of a condition: the type of the scores.
    """

    value: ir.Value
    scores: tuple[Dim, ...]
    factor: float = 1.0
    fill: float | None = None
    keeps: bool = True
    dtype: ir.DataType | None = None


@dataclass
class Scores:
    """What a softmax is taken of.

    Args:
        product: Q · Kᵀ.
        q, k: its operands, K as in Q · Kᵀ before it was transposed.
        factor: of the product.
        masks: all are added.
        nodes: from the product to the softmax: nothing else may read what they make.
    """

    product: ir.Value
    q: Operand
    k: Operand
    factor: float
    masks: list[Mask] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)


def read_scores(scores: ir.Value) -> Scores:
    """Read from what a softmax takes back to a product.

    Raises:
        MatchFailureError: what is between them is more than a scale and masks; without a reason, where there is no
            product at all.
    """
    if not _comes_from_product(scores):
        raise MatchFailureError("", scores)
    factor, masks, nodes, value = 1.0, list[Mask](), list[ir.Node](), scores
    while (node := value.producer()) is not None:
        nodes.append(node)
        if is_product(node):
            _check_masked(masks)
            return Scores(value, *product_operands(node), factor, masks, nodes)
        value, times, mask = _step(node)
        if mask is not None:
            _check_stretches_nothing(mask)
            if mask.fill is not None or not is_zero(mask.value):
                masks.append(replace(mask, factor=factor))
        factor *= times
    raise MatchFailureError("the softmax is not one of a product", value)


def _step(node: ir.Node) -> tuple[ir.Value, float, Mask | None]:
    """One node nearer to the product: what it reads, its factor, and its mask."""
    first, second = (*node.inputs, None)[:2]
    if node.domain == "" and first is not None:
        if node.op_type == "Reshape":
            check_regrouped(node)
        if node.op_type == "Cast" and node.outputs[0].dtype not in _FLOATS:
            raise MatchFailureError("scores are cast to a type with less of them", node)
        if node.op_type in _AS_THEY_ARE:
            return first, 1.0, None
        if node.op_type in ("Mul", "Div"):
            return _scaled(node)
        if node.op_type == "Add" and second is not None:
            return _masked(node, first, second)
        if node.op_type == "Where":
            return _filled(node)
    raise MatchFailureError(f"between the product and the softmax is more than a scale and masks: {node.op_type}", node)


def _scaled(node: ir.Node) -> tuple[ir.Value, float, None]:
    scores, scale = scaled_by(node)
    if scores is None:
        raise MatchFailureError("the scores' scale is not one known number", node)
    check_adds_no_axis(node, scores)
    return scores, scale, None


def _masked(node: ir.Node, first: ir.Value, second: ir.Value) -> tuple[ir.Value, float, Mask]:
    for scores, mask in ((first, second), (second, first)):
        if _leads_to_product(scores):
            return scores, 1.0, Mask(mask, _dims(scores))
    raise MatchFailureError("what is masked is not a product", node)


def _leads_to_product(value: ir.Value) -> bool:
    """Whether a value is a product, scaled and masked or not: one that is near, each value looked at once."""
    seen, values = {value}, [value]
    for _ in range(_NEAR):
        nodes = [node for v in values if (node := v.producer()) is not None]
        if any(map(is_product, nodes)):
            return True
        values = [v for v in dict.fromkeys(v for node in nodes for v in _may_be_scores(node)) if v not in seen]
        seen.update(values)
    return False


def _may_be_scores(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node of which one may be scores that it scales or masks."""
    if node.op_type not in (*_AS_THEY_ARE, "Add", "Mul", "Div", "Where"):
        return []
    inputs = {"Add": node.inputs, "Mul": node.inputs, "Where": node.inputs[1:]}.get(node.op_type, node.inputs[:1])
    return [v for v in inputs if v is not None]


def _comes_from_product(value: ir.Value) -> bool:
    """Whether a value is made of a product, by whatever ops with one main input."""
    for _ in range(_NEAR):
        node = value.producer()
        if node is None or is_product(node) or not node.inputs:
            return node is not None and is_product(node)
        inputs = [v for v in node.inputs if v is not None]
        value = next((v for v in inputs if _leads_to_product(v)), inputs[0])
    return False


def _filled(node: ir.Node) -> tuple[ir.Value, float, Mask]:
    condition, if_true, if_false = node.inputs
    assert condition is not None and if_true is not None and if_false is not None
    for scores, other, keeps in ((if_true, if_false, True), (if_false, if_true, False)):
        fill = number(other)
        if fill is not None:
            check_adds_no_axis(node, scores)
            return scores, 1.0, Mask(condition, _dims(scores), fill=fill, keeps=keeps, dtype=scores.dtype)
    raise MatchFailureError("scores are replaced by what is not one known number", node)


def check_adds_no_axis(node: ir.Node, scores: ir.Value) -> None:
    """Check that what a node makes of scores or probabilities has as many axes: one number may have more.

    Raises:
        MatchFailureError: it has not.
    """
    rank = len(_dims(scores))
    for value in node.inputs:
        if value is not scores and value is not None and (value.shape is None or len(value.shape) > rank):
            raise MatchFailureError("the scores may get more axes", value)


def _check_stretches_nothing(mask: Mask) -> None:
    if mask.value.shape is None:
        raise MatchFailureError("the shape of the mask is not known", mask.value)
    if stretches(mask.scores, tuple(mask.value.shape)):
        raise MatchFailureError("the mask stretches the scores", mask.value)


def _check_masked(masks: list[Mask]) -> None:
    for mask in masks:
        lowest = _MASKED.get(mask.dtype or ir.DataType.UNDEFINED, -math.inf)
        if mask.fill is not None and not mask.fill * mask.factor <= lowest:
            fill = f"{mask.fill * mask.factor:g}"
            raise MatchFailureError(f"scores are replaced by {fill}, which is not far below all others", mask.value)


def _dims(scores: ir.Value) -> tuple[Dim, ...]:
    if scores.shape is None:
        raise MatchFailureError("the shape of the scores is not known", scores)
    return tuple(scores.shape)


def check_regrouped(node: ir.Node) -> None:
    """Check that a reshape of scores or probabilities parts or merges batch and heads, and no more.

    Raises:
        MatchFailureError: it does.
    """
    before, after = (() if v is None or v.shape is None else tuple(v.shape) for v in (node.inputs[0], node.outputs[0]))
    if {len(before), len(after)} != {3, 4} or not same_dims(before[-2:], after[-2:]):
        raise MatchFailureError("scores are reshaped to other axes", node)


def readers_outside(nodes: list[ir.Node], last: ir.Node) -> Iterator[ir.Value]:
    """What nodes other than these and the last read of them, or the graph gives."""
    inside = {*nodes, last}
    for node in nodes:
        for output in node.outputs:
            if output.is_graph_output() or any(user not in inside for user, _ in output.uses()):
                yield output
