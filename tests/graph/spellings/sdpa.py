"""Scaled dot product attention: torch's own call, and what models wrote before there was one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from case import Case
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

B, H, N, M, D = 3, 4, 5, 7, 8  # batch, heads, tokens of Q, tokens of K and V, head width
FUSED = {"Attention": 1, "Softmax": 0}
LEFT = {"Attention": 0}
_HEADS_FIRST = {0: "batch", 2: "tokens"}
_TOKENS_FIRST = {0: "batch", 1: "tokens"}


class Function(nn.Module):
    """A function of up to five tensors, as a module: exporters name a module's arguments."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, extra: Tensor | None = None) -> Any:
        """Call it."""
        rest = [t for t in (mask, extra) if t is not None]
        return self.function(q, k, v, *rest)


def _values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(math.prod(shape)).reshape(shape) % 7 / 5 - 0.5).to(dtype)


def _case(
    name: str,
    function: Callable[..., Any],
    expect: Mapping[str, int] = FUSED,
    *,
    mask: tuple[Tensor, Mapping[int, str]] | None = None,
    kv_heads: int = H,
    width: int = D,
    dtype: torch.dtype = torch.float32,
    exporters: tuple[str, ...] = ("dynamo", "torchscript"),
) -> Case:
    """A case of (B, H, N, D) inputs, with other tokens for K and V."""
    inputs = {
        "q": _values(B, H, N, width, dtype=dtype),
        "k": _values(B, kv_heads, M, width, dtype=dtype),
        "v": _values(B, kv_heads, M, width, dtype=dtype),
    }
    axes: dict[str, Mapping[int, str]] = {"q": _HEADS_FIRST, "k": {0: "batch", 2: "keys"}, "v": {0: "batch", 2: "keys"}}
    if mask is not None:
        inputs["mask"], axes["mask"] = mask
    return Case(name, Function(function), inputs, axes, expect, exporters)


def _self_case(name: str, module: nn.Module, expect: Mapping[str, int] = FUSED, width: int = H * D) -> Case:
    """A case of one (B, N, C) input."""
    return Case(name, module, {"x": _values(B, N, width)}, {"x": _TOKENS_FIRST}, expect)


# Masks, with their dynamic axes.
PAIRS = (_values(N, M), {0: "tokens", 1: "keys"})
OF_KEYS = (_values(B, 1, 1, M), {0: "batch", 3: "keys"})
PER_HEAD = (_values(1, H, N, M), {2: "tokens", 3: "keys"})
PAIRS_OF_SAMPLES = (_values(B, 1, N, M), {0: "batch", 2: "tokens", 3: "keys"})
BOOL_PAIRS = (_values(B, 1, N, M) > -0.4, {0: "batch", 2: "tokens", 3: "keys"})
BOOL_OF_KEYS = (_values(B, 1, 1, M) > -0.4, {0: "batch", 3: "keys"})


# How models spelled it.
def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def scaled_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q · Kᵀ · s) · V"""
    return (_scores(q, k) * D**-0.5).softmax(-1) @ v


def divided_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q · Kᵀ / √D) · V"""
    return (_scores(q, k) / math.sqrt(D)).softmax(-1) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax((s · Q) · Kᵀ) · V"""
    return _scores(q * 0.3, k).softmax(-1) @ v


def divided_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax((Q / √D) · Kᵀ) · V, with the width read from the shape"""
    return _scores(q / q.shape[-1] ** 0.5, k).softmax(-1) @ v


def scaled_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax((Q · D^-¼) · (K · D^-¼)ᵀ) · V"""
    return _scores(q * D**-0.25, k * D**-0.25).softmax(-1) @ v


def scale_of_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q · Kᵀ / √tensor(D)) · V"""
    return (_scores(q, k) / torch.sqrt(torch.tensor(k.shape[-1], dtype=q.dtype))).softmax(-1) @ v


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q · Kᵀ) · V"""
    return _scores(q, k).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As einsum writes it."""
    probabilities = (torch.einsum("bhnd,bhmd->bhnm", q, k) * D**-0.5).softmax(-1)
    return torch.einsum("bhnm,bhmd->bhnd", probabilities, v)


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax in fp32."""
    return torch.softmax(_scores(q, k) * D**-0.5, -1, dtype=torch.float32).to(q.dtype) @ v


def upcast_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scale, mask and softmax in fp32."""
    scores = _scores(q, k).float() * D**-0.5 + mask.float()
    return scores.softmax(-1).to(q.dtype) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked scores become -inf."""
    return (_scores(q, k) * D**-0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v


def filled_lowest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked scores become the lowest number."""
    scores = _scores(q, k) * D**-0.5
    return torch.where(mask, scores, torch.finfo(q.dtype).min).softmax(-1) @ v


def guarded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A row that is all masked becomes zeros."""
    probabilities = (_scores(q, k) * D**-0.5).masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(torch.isnan(probabilities), 0.0, probabilities) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A bias per head and a triangle of what may be seen."""
    triangle = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = _scores(q, k) * D**-0.5 + bias
    return scores.masked_fill(~triangle, torch.finfo(q.dtype).min).softmax(-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch axis, as of before diffusers had processors: (B·H, N, D)."""
    q3, k3, v3 = (t.reshape(-1, t.shape[2], D) for t in (q, k, v))
    empty = torch.empty(q3.shape[0], q3.shape[1], k3.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q3, k3.transpose(-1, -2), beta=0, alpha=D**-0.5)
    return torch.bmm(scores.softmax(-1), v3).reshape(q.shape[0], H, q.shape[2], D)


def batched_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As CLIP had it: the mask is added with the heads apart."""
    q3, k3, v3 = (t.reshape(-1, t.shape[2], D) for t in (q * D**-0.5, k, v))
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(q.shape[0], H, q.shape[2], k.shape[2]) + mask
    probabilities = scores.view(-1, q.shape[2], k.shape[2]).softmax(-1)
    return torch.bmm(probabilities, v3).view(q.shape[0], H, q.shape[2], D)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of K and V shared, as LLMs repeat them."""
    k4, v4 = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], H, t.shape[2], D) for t in (k, v))
    return scaled_after(q, k4, v4)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of K and V shared, by repeat_interleave."""
    return scaled_after(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of K and V repeated in another order: 0, 1, 0, 1 is no group."""
    return scaled_after(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


class FoldedTranspose(nn.Module):
    """K of x, with its transpose in the split of heads; the same for one head, as a VAE has it."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, H·D]"""
        if self.heads == 1:
            return ((x @ x.transpose(1, 2)) * 0.25).softmax(-1) @ x
        x4 = x.reshape(x.shape[0], x.shape[1], self.heads, -1)
        q, k_T, v = x4.permute(0, 2, 1, 3), x4.permute(0, 2, 3, 1), x4.permute(0, 2, 1, 3)
        out = ((q @ k_T) * 0.25).softmax(-1) @ v
        return out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


class Packed(nn.Module):
    """One projection of Q, K and V, split as in timm and Stability's code."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, 3·H·D]"""
        q, k, v = x.reshape(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


class Joint(nn.Module):
    """Two streams, normalized and concatenated with the heads first: SD3's block."""

    def forward(self, img: Tensor, txt: Tensor) -> Tensor:
        """img [B, N, H·D], txt [B, M, H·D]"""
        streams = [x.view(x.shape[0], -1, H, D).transpose(1, 2) for x in (img, txt)]
        q = torch.cat([x * 0.5 for x in streams], dim=2)
        k = torch.cat([torch.tanh(x) for x in streams], dim=2)
        v = torch.cat(streams, dim=2)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(img.shape[0], -1, H * D)


CASES = (
    _case("torch", lambda q, k, v: scaled_dot_product_attention(q, k, v)),
    _case("torch-scale", lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.2)),
    _case("torch-pairs", lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m), mask=PAIRS),
    _case("torch-keys", lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m), mask=OF_KEYS),
    _case("torch-bool", lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m), mask=BOOL_PAIRS),
    _case("torch-bool-keys", lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m), mask=BOOL_OF_KEYS),
    _case("torch-causal", lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)),
    _case("torch-grouped", lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), kv_heads=2),
    _case("torch-half", lambda q, k, v: scaled_dot_product_attention(q, k, v), dtype=torch.float16),
    _case("scaled-after", scaled_after),
    _case("divided-after", divided_after),
    _case("scaled-before", scaled_before),
    _case("divided-before", divided_before),
    _case("scaled-both", scaled_both),
    _case("scale-of-tensor", scale_of_tensor),
    _case("unscaled", unscaled),
    _case("einsum", einsum),
    _case("upcast", upcast, dtype=torch.float16),
    _case("upcast-scores", upcast_scores, dtype=torch.float16, mask=PER_HEAD),
    _case("filled", filled, mask=BOOL_PAIRS),
    _case("filled-lowest", filled_lowest, mask=BOOL_OF_KEYS),
    _case("guarded", guarded, mask=BOOL_PAIRS),
    _case("biased", biased, mask=PER_HEAD),
    _case("batched", batched),
    _case("batched-masked", batched_masked, mask=PAIRS_OF_SAMPLES),
    _case("grouped", grouped, kv_heads=2),
    _case("interleaved", interleaved, kv_heads=2),
    _case("tiled", tiled, kv_heads=2),
    _case("dropout", lambda q, k, v: dropout(_scores(q, k).softmax(-1), 0.1, training=False) @ v),
    _self_case("folded-transpose", FoldedTranspose(H)),
    _self_case("one-head", FoldedTranspose(1)),
    _self_case("packed", Packed(), width=3 * H * D),
    Case(
        "joint",
        Joint(),
        {"img": _values(B, N, H * D), "txt": _values(B, M, H * D)},
        {"img": {0: "batch", 1: "img"}, "txt": {0: "batch", 1: "txt"}},
        FUSED,
    ),
    # near misses
    _case("softmax-of-queries", lambda q, k, v: (_scores(q, k) * 0.3).softmax(-2) @ v, LEFT),
    _case("softcap", lambda q, k, v: (_scores(q, k) * 0.3).tanh().softmax(-1) @ v, LEFT),
    _case("probabilities-kept", lambda q, k, v: ((p := _scores(q, k).softmax(-1)) @ v, p), LEFT),
    _case("scale-per-head", lambda q, k, v, s: (_scores(q, k) * s).softmax(-1) @ v, LEFT, mask=(_values(H, 1, 1), {})),
)
