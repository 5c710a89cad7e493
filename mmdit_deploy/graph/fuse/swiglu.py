"""SwiGLU, after SiLU.

    MMDiTSiLU(gate) · value   ⇒   MMDiTSwiGLU(gate, value)

The anchor is any product of a SiLU with another computed tensor of its shape: two halves of one tensor (in either
order, by Split or Slice), or two linear layers. One that broadcasts is no gated linear unit but, say, attention over
channels, and stays.
"""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter.pattern import MatchResult, OrValue, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.constants import is_constant
from mmdit_deploy.graph.fuse.token_shapes import are_alike
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, rule_pass


class _SwiGLU(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, gate: Any, value: Any) -> Any:
        activated = op.MMDiTSiLU(gate, _domain=DOMAIN, _outputs=["silu"])
        return op.Mul(OrValue([activated, op.Cast(activated)], name="factor"), value)

    def check(self, op: Any, gate: Any, value: Any, silu: Any, factor: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if is_constant(value):
            return result.fail()  # a SiLU of another size
        if value is gate or value is silu:
            return result.fail("the gate and the value are one tensor", gate)
        if gate.shape is None or value.shape is None:
            return result.fail("the shapes are not known", [gate, value])
        if not are_alike(gate, value):
            return result.fail("the gate and the value are not of one shape", [gate, value])
        if factor is not silu:
            return result.fail("the SiLU is of another type than the value", factor)
        return result

    def rewrite(self, op: Any, gate: Any, value: Any, **_: Any) -> Any:
        return op.MMDiTSwiGLU(gate, value, _domain=DOMAIN)


swiglu: Pass = rule_pass("SwiGLU", *_SwiGLU.rule().commute())
