"""ONNX Runtime's attention that does not hold the score matrix.

    Attention(q, k, v)   ⇒   com.microsoft.MultiHeadAttention(q, k, v)

    Attention(q, k, v, mask)   ⇒   com.microsoft.MultiHeadAttention(q, k, v, attention_bias: mask)

On CPU the standard op holds all B·H·N² scores (850 MB at 4,173 tokens × 12 heads in fp32); this one works in tiles,
unless there is a mask.

It makes NaN of a row that is all masked with -inf, where ONNX's op makes zeros: a mask must be known to be finite, as
that of `mmdit_deploy.model.embeddings.AttentionMask` is.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRule, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.lower.lowest import Lowest
from mmdit_deploy.graph.passes import Left, Pass, rule_pass

MICROSOFT = "com.microsoft"
# bf16 is there for what is emulated afterwards, and for ONNX Runtime on a GPU.
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class _MultiHeadAttention(RewriteRuleClassBase):
    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_attributes=True, _outputs=["attended"])

    def check(self, op: Any, q: Any, attended: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        attributes = attended.producer().attributes
        if given_by_call(attended.producer()) is not None:
            return result.fail("its heads or scale differ from call to call", attended)
        if q.dtype not in _TYPES:
            return result.fail(f"Q is {q.dtype or 'of no known type'}", q)
        if q.shape is None or len(q.shape) != 3:
            return result.fail("not in (B, N, H·D) layout", q)
        if attributes.get_int("q_num_heads", 0) != attributes.get_int("kv_num_heads", 0):
            return result.fail("grouped heads", attended)
        if attributes.get_int("is_causal", 0) or attributes.get_float("softcap", 0.0):
            return result.fail("causal or soft-capped", attended)
        return result

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, attended: Any, mask: Any = None, **_: Any) -> Any:
        attributes = attended.producer().attributes
        kept = {n: a for n, a in attributes.items() if n == "scale"}
        heads = attributes["q_num_heads"].as_int()
        rest = () if mask is None else (None, None, mask)
        return op.MultiHeadAttention(q, k, v, *rest, num_heads=heads, _domain=MICROSOFT, **kept)


class _MaskedMultiHeadAttention(_MultiHeadAttention):
    def __init__(self) -> None:
        super().__init__()
        self.lowest: Lowest | None = None  # of the model at hand

    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:  # type: ignore[override]
        return op.Attention(q, k, v, mask, _allow_other_attributes=True, _outputs=["attended"])

    def check(self, op: Any, q: Any, attended: Any, mask: Any = None, **_: Any) -> MatchResult:
        if mask.shape is None or len(mask.shape) != 4 or 1 in list(mask.shape)[2:]:
            return MatchResult().fail("the mask does not have every pair of tokens", mask)
        if mask.dtype is None or mask.dtype == ir.DataType.BOOL:
            return MatchResult().fail("the mask is not one that is added", mask)
        if self.lowest is None or math.isinf(self.lowest(mask)):
            return MatchResult().fail("the mask may be infinite: the op makes NaN of a row that is all masked", mask)
        return super().check(op, q, attended)


def _pass() -> Pass:
    masked = _MaskedMultiHeadAttention()
    rules = rule_pass("multi-head attention", _MultiHeadAttention.rule(), _rule_of(masked))

    def apply(model: ir.Model) -> int:
        masked.lowest = Lowest(model)
        try:
            return rules.apply(model)
        finally:
            masked.lowest = None

    def left(model: ir.Model) -> tuple[Left, ...]:
        masked.lowest = Lowest(model)
        try:
            return rules.left(model)
        finally:
            masked.lowest = None

    return Pass(rules.name, apply, left)


def _rule_of(rule: RewriteRuleClassBase) -> RewriteRule:
    return RewriteRule(rule.pattern, rule.rewrite, rule.check, name=rule.name, remove_nodes=rule.remove_nodes)


multi_head_attention: Pass = _pass()
