"""SiLU.

    x · Sigmoid(x)        ⇒   MMDiTSiLU(x)
    x / (1 + Exp(−x))     ⇒   MMDiTSiLU(x)

Factors and summands in any order. Casts around it stay around it. Where the exponential overflows, the quotient is −0
and the product the small number itself.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.constants import adds_no_axis, is_constant, is_one
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, rule_pass


class _Product(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, gate: Any) -> Any:
        return op.Mul(x, op.Sigmoid(gate))

    def check(self, op: Any, x: Any, gate: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if gate is x:
            return result
        if _is_multiple(gate, x):
            return result.fail("the sigmoid is of a multiple of x, as in QuickGELU", gate)
        return result.fail()  # a gate of something else

    def rewrite(self, op: Any, x: Any, **_: Any) -> Any:
        return op.MMDiTSiLU(x, _domain=DOMAIN)


class _Quotient(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, one: Any) -> Any:
        return op.Div(x, op.Add(op.Exp(op.Neg(x)), one))

    def check(self, op: Any, x: Any, one: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if not is_one(one):
            return result.fail("not 1 is added to the exponential", one)
        return result if adds_no_axis(one, x) else result.fail("the 1 that is added has more axes than x", one)

    def rewrite(self, op: Any, x: Any, **_: Any) -> Any:
        return op.MMDiTSiLU(x, _domain=DOMAIN)


def _is_multiple(value: ir.Value, x: ir.Value) -> bool:
    """Whether a value is x times a constant."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or x not in node.inputs:
        return False
    return any(factor is not None and is_constant(factor) for factor in node.inputs)


silu: Pass = rule_pass("SiLU", *_Product.rule().commute(), *_Quotient.rule().commute())
