"""Attention without transposes: the op's own (B, N, H·D) layout.

    Transpose(q) ┐                                Reshape(q) ┐
    Transpose(k) ├ Attention ─ Transpose ─ Reshape   ⇒   Reshape(k) ├ Attention(heads)
    Transpose(v) ┘                                Reshape(v) ┘

The reshapes only merge the last two axes, so no data moves. Norms, RoPE and concatenations between a transpose and the
attention are made without it. A mask stays as it is. One of the three may come with its heads first, as from a cache:
it is transposed, and two transposes are still less than four. Where it is more of them, the four axes stay.

    Reshape(Reshape(Attention [B, H, N, D] → [B·H, N, D]) → [B, H, N, D])   ⇒   Attention

is what is left where an attention had its heads in the batch axis.
"""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import pattern
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import Ints
from mmdit_deploy.graph.fuse.attention.heads import same_dims
from mmdit_deploy.graph.fuse.attention.tokens_first import heads_merged, merged_shape, swapped, tokens_first, transposed
from mmdit_deploy.graph.passes import Pass, rule_pass

_MOST_TRANSPOSED = 1  # of Q, K and V: with two, their transposes and the result's are no more than before


class _Attention3D(RewriteRuleClassBase):
    def __init__(self) -> None:
        # What was transposed may have more readers.
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, q: Any, k: Any, v: Any, shape: Any) -> Any:
        attended = op.Attention(q, k, v, _allow_other_attributes=True, _outputs=["attended"])
        return op.Reshape(op.Transpose(attended, perm=Ints(0, 2, 1, 3)), shape, _outputs=["merged"])

    def check(self, op: Any, q: Any, k: Any, v: Any, attended: Any, merged: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        for value in (q, k, v):
            if value.shape is None or len(value.shape) != 4 or not _static([value.shape[1], value.shape[3]]):
                return result.fail("heads or head width are not known", value)
        if not _merges_heads(merged.shape, swapped(q), swapped(v)):
            return result.fail("the result is not merged to (B, N, H·D)", merged)
        node = attended.producer()
        if any(node.attributes.get_int(name, 0) for name in ("is_causal", "qk_matmul_output_mode")):
            return result.fail("causal, or with the scores as an output", attended)
        if len(attended.uses()) > 1 or attended.is_graph_output() or any(o.uses() for o in node.outputs[1:]):
            return result.fail("others read the attention's result too", attended)
        heads_first = [value for value in (q, k, v) if tokens_first(value, [node]) is None]
        if len(heads_first) > _MOST_TRANSPOSED:
            return result.fail("with (B, N, H·D) there would be as many transposes", heads_first)
        return result

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, attended: Any, mask: Any = None, **_: Any) -> Any:
        node = attended.producer()
        writes = {value: tokens_first(value, [node]) or transposed(value) for value in (q, k, v)}
        written = {value: write(op) for value, write in writes.items()}
        widths = {value: value.shape[1] * value.shape[3] for value in (q, k, v)}
        shapes = {width: merged_shape(op, width) for width in dict.fromkeys(widths.values())}
        q_BNC, k_BNC, v_BNC = (heads_merged(op, written[t], widths[t], shapes[widths[t]]) for t in (q, k, v))
        kept = {n: a for n, a in node.attributes.items() if n in ("scale", "softcap", "softmax_precision")}
        masks = () if mask is None else (mask,)
        return op.Attention(q_BNC, k_BNC, v_BNC, *masks, q_num_heads=q.shape[1], kv_num_heads=k.shape[1], **kept)


class _MaskedAttention3D(_Attention3D):
    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any, shape: Any) -> Any:  # type: ignore[override]
        attended = op.Attention(q, k, v, mask, _allow_other_attributes=True, _outputs=["attended"])
        return op.Reshape(op.Transpose(attended, perm=Ints(0, 2, 1, 3)), shape, _outputs=["merged"])


class _PartsHeads(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any) -> Any:
        attended = op.Attention(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["attended"])
        merged = op.Reshape(attended, pattern.ANY_VALUE, _allow_other_attributes=True, _outputs=["merged"])
        return op.Reshape(merged, pattern.ANY_VALUE, _allow_other_attributes=True, _outputs=["parted"])

    def check(self, op: Any, attended: Any, parted: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        before, after = attended.shape, parted.shape
        same = before is not None and after is not None and same_dims(list(before), list(after))
        return result if same else result.fail()  # a reshape to other axes

    def rewrite(self, op: Any, attended: Any, **_: Any) -> Any:
        return attended


def _merges_heads(merged: Any, q: Any, v: Any) -> bool:
    """Whether (B, N, H, D) becomes (B, N, H·D), and not, say, (B, N·H, D) or (1, B·N, H·D)."""
    if merged is None or len(merged) != 3 or merged[2] != q[2] * v[3]:
        return False
    return same_dims(list(merged)[:2], list(q)[:2])


def _static(dims: Any) -> bool:
    return all(isinstance(d, int) for d in dims)


attention_layout: Pass = rule_pass("attention layout", _Attention3D.rule(), _MaskedAttention3D.rule())
attention_heads: Pass = rule_pass("attention heads", _PartsHeads.rule())
