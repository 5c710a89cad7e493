"""A mask of keys stays one row per sample.

    Attention(q, k, v, Expand(mask [B, 1, 1, N]))   ⇒   Attention(q, k, v, mask)

ONNX lets a mask broadcast over heads and queries, and TensorRT reads it so. Spelled out, it makes all blocks' masks at
once and keeps them: [B, 1, N, N] each, 73 GB for Qwen-Image's 60 blocks at 4 × 8448 tokens. (ONNX Runtime's Attention
does not broadcast over queries, so the standard graph spells them out.)
"""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.passes import Pass, rule_pass


class _MaskOfKeys(RewriteRuleClassBase):
    def __init__(self) -> None:
        # Many attentions may read one mask that is spelled out: it goes with the last of them.
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any, shape: Any) -> Any:
        expanded = op.Expand(mask, shape, _outputs=["expanded"])
        return op.Attention(q, k, v, expanded, _allow_other_attributes=True, _outputs=["attended"])

    def check(self, op: Any, mask: Any, expanded: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        before, after = mask.shape, expanded.shape
        if before is None or after is None or len(before) != 4 or len(after) != 4:
            return result.fail("the mask's axes are not known", mask)
        if list(before)[1:3] != [1, 1]:
            return result.fail("the mask is not one of keys", mask)
        if before[0] != after[0] or before[3] != after[3]:
            return result.fail("more than heads and queries are spelled out", expanded)
        return result

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, mask: Any, attended: Any, **_: Any) -> Any:
        return op.Attention(q, k, v, mask, **attended.producer().attributes)


mask_of_keys: Pass = rule_pass("mask of keys", _MaskOfKeys.rule())
