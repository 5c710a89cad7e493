"""Attention without transposes: the op's own (B, N, H·D) layout.

    Transpose(q) ┐                                Reshape(q) ┐
    Transpose(k) ├ Attention ─ Transpose ─ Reshape   ⇒   Reshape(k) ├ Attention(heads)
    Transpose(v) ┘                                Reshape(v) ┘

The reshapes only merge the last two axes, so no data moves. A mask stays as it is.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _Attention3D(RewriteRuleClassBase):
    def pattern(self, op: Any, q: Any, k: Any, v: Any, shape: Any) -> Any:
        q_BHND, k_BHND, v_BHND = (op.Transpose(t, perm=[0, 2, 1, 3]) for t in (q, k, v))
        attended = op.Attention(q_BHND, k_BHND, v_BHND, _allow_other_attributes=True, _outputs=["attended"])
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), shape, _outputs=["merged"])

    def check(self, op: Any, q: Any, k: Any, v: Any, attended: Any, merged: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        for value in (q, k, v):
            if value.shape is None or len(value.shape) != 4 or not _static(value.shape[2:]):
                return result.fail("heads or head width are not known", value)
        if not _merges_heads(merged.shape, q.shape, v.shape):
            return result.fail("the result is not merged to (B, N, H·D)", merged)
        attributes = attended.producer().attributes
        if any(attributes.get_int(name, 0) for name in ("is_causal", "qk_matmul_output_mode")):
            return result.fail("causal, or with the scores as an output", attended)
        return result

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, attended: Any, mask: Any = None, **_: Any) -> Any:
        # The width is written out: where N is symbolic, ONNX's shape inference makes nothing of a -1, and of an
        # Attention whose width is unknown it makes a wrong shape, with which ONNX Runtime refuses the graph.
        widths = [t.shape[2] * t.shape[3] for t in (q, k, v)]
        merges = {w: op.Constant(value=ir.tensor([0, 0, w], dtype=ir.DataType.INT64)) for w in dict.fromkeys(widths)}
        q_BNC, k_BNC, v_BNC = (
            like(op.Reshape(t, merges[w]), t, [*t.shape[:2], w]) for t, w in zip((q, k, v), widths, strict=True)
        )
        attributes = attended.producer().attributes
        kept = {n: a for n, a in attributes.items() if n in ("scale", "softcap", "softmax_precision")}
        masks = () if mask is None else (mask,)
        return op.Attention(q_BNC, k_BNC, v_BNC, *masks, q_num_heads=q.shape[2], kv_num_heads=k.shape[2], **kept)


class _MaskedAttention3D(_Attention3D):
    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any, shape: Any) -> Any:  # type: ignore[override]
        q_BHND, k_BHND, v_BHND = (op.Transpose(t, perm=[0, 2, 1, 3]) for t in (q, k, v))
        attended = op.Attention(q_BHND, k_BHND, v_BHND, mask, _allow_other_attributes=True, _outputs=["attended"])
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), shape, _outputs=["merged"])


def _merges_heads(merged: Any, q: Any, v: Any) -> bool:
    """Whether (B, N, H, D) becomes (B, N, H·D), and not, say, (B, N·H, D) or (1, B·N, H·D)."""
    if merged is None or len(merged) != 3 or merged[2] != q[2] * v[3]:
        return False
    return all(new == old for new, old in zip(merged[:2], q[:2], strict=True) if isinstance(new, int))


def _static(dims: Any) -> bool:
    return all(isinstance(d, int) for d in dims)


attention_layout: Pass = rule_pass("attention layout", _Attention3D.rule(), _MaskedAttention3D.rule())
