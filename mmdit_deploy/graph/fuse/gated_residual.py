"""A residual with a gate from the conditioning.

    x + gate · y   ⇒   MMDiTGatedResidual(x, gate, y)

Factors and summands in any order. x and y are [B, N, C]. The gate is one vector per sample, [B, 1, C], or one per
token that is chosen by a Where among such vectors. Any other tensor of x's shape may be anything, and stays.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.constants import is_constant
from mmdit_deploy.graph.fuse.token_shapes import are_alike, is_BNC, is_per_sample
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, rule_pass


class _GatedResidual(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, gate: Any, y: Any) -> Any:
        return op.Add(x, op.Mul(gate, y))

    def check(self, op: Any, x: Any, gate: Any, y: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if not (is_BNC(x) and are_alike(x, y)) or gate.shape is None or is_constant(x) or is_constant(y):
            return result.fail()  # some other sum
        if is_constant(gate):
            return result.fail("the gate is the same for all samples", gate) if _is_vector(gate) else result.fail()
        if is_per_sample(gate, y) or _is_chosen_by_token(gate, y):
            return result
        if are_alike(gate, y):
            return result.fail("the gate is of each token and channel, and not from the conditioning", gate)
        return result.fail("the gate is not one vector per sample", gate)

    def rewrite(self, op: Any, x: Any, gate: Any, y: Any, **_: Any) -> Any:
        return op.MMDiTGatedResidual(x, gate, y, _domain=DOMAIN)


def _is_chosen_by_token(gate: ir.Value, y: ir.Value) -> bool:
    """Whether a gate is Where(of each token, [B, 1, C], [B, 1, C])."""
    node = gate.producer()
    if node is None or node.op_type != "Where":
        return False
    return all(choice is not None and is_per_sample(choice, y) for choice in node.inputs[1:])


def _is_vector(value: ir.Value) -> bool:
    """Whether it has more than one element: a layer scale, and not a number."""
    return value.shape is None or any(dim != 1 for dim in value.shape)


gated_residual: Pass = rule_pass("gated residual", *_GatedResidual.rule().commute())
