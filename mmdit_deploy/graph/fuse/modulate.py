"""AdaLN's modulation (Peebles & Xie 2023, arXiv:2212.09748), after the norms.

    norm(x) · (1 + scale) + shift   ⇒   MMDiTModulate(norm(x), scale, shift)

Factors and summands in any order; `norm` is LayerNormalization or RMSNormalization, with or without a cast. Scale and
shift are one vector per sample, [B, 1, C], or per token. `scale` may get its axis of tokens after 1 was added:

    Unsqueeze(1 + scale)   ⇒   1 + Unsqueeze(scale)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.constants import adds_no_axis, is_constant, is_one
from mmdit_deploy.graph.fuse.token_shapes import is_BNC, is_modulation, is_per_sample
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, like, rule_pass

_NORMS = ("LayerNormalization", "RMSNormalization")
_MOVES = ("Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class _Scale:
    """The scale in 1 + scale, and the nodes that bring the sum to its shape, last one first."""

    scale: ir.Value
    moves: tuple[ir.Node, ...]


class _Modulate(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, factor: Any, shift: Any) -> Any:
        return op.Add(op.Mul(x, factor), shift)

    def check(self, op: Any, x: Any, factor: Any, shift: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        normed, scaled = _is_normed(x), _read(factor) is not None
        if not (normed or scaled) or not is_BNC(x):
            return result.fail()  # some other sum
        if not normed:
            return result.fail("what is modulated is not a norm", x) if is_per_sample(factor, x) else result.fail()
        if not scaled:
            return _not_one_plus(x, factor)
        for name, value in (("scale", factor), ("shift", shift)):
            if is_constant(value):
                return result.fail(f"the {name} is the same for all samples", value)
            if not is_modulation(value, x):
                return result.fail(f"the {name} is not one vector per sample or token", value)
        return result

    def rewrite(self, op: Any, x: Any, factor: Any, shift: Any, **_: Any) -> Any:
        read = _read(factor)
        assert read is not None
        scale = read.scale
        for node in reversed(read.moves):
            moved = getattr(op, node.op_type)(scale, *node.inputs[1:], **node.attributes)
            scale = like(moved, read.scale, list(node.outputs[0].shape or ()))
        return op.MMDiTModulate(x, scale, shift, _domain=DOMAIN)


class _NoShift(RewriteRuleClassBase):
    """Never fires: what is scaled and not shifted has no name."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, factor: Any) -> Any:
        return op.Mul(x, factor, _outputs=["scaled"])

    def check(self, op: Any, x: Any, factor: Any, scaled: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        shifted = any(node.op_type == "Add" for node, _ in scaled.uses())
        if shifted or not _is_normed(x) or _read(factor) is None or not is_modulation(factor, x):
            return result.fail()  # some other product
        return result.fail("no shift is added", scaled)

    def rewrite(self, op: Any, scaled: Any, **_: Any) -> Any:
        return None


def _not_one_plus(x: ir.Value, factor: ir.Value) -> MatchResult:
    result = MatchResult()
    if not is_per_sample(factor, x) or is_constant(factor):
        return result.fail()  # the norm's own weight, or RoPE
    cast = factor.producer()
    if cast is not None and cast.op_type == "Cast" and _read(cast.inputs[0]) is not None:
        return result.fail("1 + scale is computed in another type", factor)
    return result.fail("the scale is not added to 1", factor)


def _is_normed(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _NORMS and node.domain == ""


def _read(factor: ir.Value | None) -> _Scale | None:
    """The scale, where a factor is 1 + scale, moved or not."""
    moves: list[ir.Node] = []
    while factor is not None and (node := factor.producer()) is not None and node.domain == "":
        if node.op_type == "Add":
            return next((_Scale(scale, tuple(moves)) for scale in _added_to_one(node)), None)
        if node.op_type not in _MOVES:
            return None
        moves.append(node)
        factor = node.inputs[0]
    return None


def _added_to_one(add: ir.Node) -> Iterator[ir.Value]:
    for one, scale in (add.inputs, reversed(add.inputs)):
        if one is not None and scale is not None and is_one(one) and adds_no_axis(one, scale):
            yield scale


modulate: Pass = rule_pass("modulate", *_Modulate.rule().commute(), *_NoShift.rule().commute())
