"""The parts that every MMDiT block is made of.

Shapes: B batch, N tokens, C channels (the model's width), H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit_deploy.spec import ModelSpec

# Every norm has this epsilon (diffusers JointTransformerBlock, FluxTransformerBlock, QwenImageTransformerBlock, …).
EPS = 1e-6
FP16_MAX = 65504.0  # the largest finite fp16


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


def attention(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, mask_B11N: Tensor | None = None) -> Tensor:
    """Softmax attention with scale 1/√D, over all tokens.

    Args:
        mask_B11N: added to the scores of each token, as a key.

    Returns:
        [B, N, H·D]
    """
    q_BHND, k_BHND, v_BHND = (t.transpose(1, 2) for t in (q_BNHD, k_BNHD, v_BNHD))
    # Every query's own row is spelled out: ONNX Runtime's Attention does not broadcast that axis.
    mask = None if mask_B11N is None else mask_B11N.to(q_BNHD.dtype).expand(-1, -1, q_BNHD.shape[1], -1)
    out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask)
    return out_BHND.transpose(1, 2).flatten(2)


def rotate(x_BNHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """RoPE (Su et al. 2021, arXiv:2104.09864): each pair of neighbouring channels, turned by its token's angle.

    In fp32, as diffusers does: cosine and sine of a small angle differ from 1 and 0 by less than fp16 resolves.

    Args:
        cos_ND, sin_ND: of each token and pair: [N, D/2] fp32.
    """
    even, odd = x_BNHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_ND[:, None], sin_ND[:, None]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x_BNHD.dtype)


def modulate(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """AdaLN (Peebles & Xie 2023, arXiv:2212.09748): a norm without weights, then scale and shift per sample."""
    return F.layer_norm(x_BNC, (x_BNC.shape[-1],), eps=EPS) * (1 + scale_B1C) + shift_B1C


def clip_fp16(x: Tensor) -> Tensor:
    """In fp16 an overflow becomes the largest finite number (diffusers' FLUX and Qwen-Image); elsewhere nothing.

    Here both streams: diffusers' FLUX clips a joint block's text alone, and an Inf in the image would spread.
    """
    return x.clamp(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x


def finite(spec: ModelSpec) -> Callable[[Tensor], Tensor]:
    """What the spec does to the streams that leave a block."""
    return clip_fp16 if spec.fp16_clip else nn.Identity()


class QKV(nn.Module):
    """One projection to Q, K and V, with optional RMSNorm on each head's Q and K.

    [B, N, C] → three of [B, N, H, D]
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.num_heads = spec.num_heads
        self.proj = nn.Linear(spec.width, 3 * spec.width, bias=spec.bias)
        self.norm_q = RMSNorm(spec.head_dim) if spec.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(spec.head_dim) if spec.qk_norm else nn.Identity()

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BNHD, k_BNHD, v_BNHD = (t.unflatten(-1, (self.num_heads, -1)) for t in self.proj(x_BNC).chunk(3, dim=-1))
        return self.norm_q(q_BNHD), self.norm_k(k_BNHD), v_BNHD


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form. [B, N, K] → [B, N, K]"""
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): the first half, activated, times the second. [B, N, 2·K] → [B, N, K]"""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {"gelu": (gelu, 1), "swiglu": (swiglu, 2)}


class MLP(nn.Module):
    """Linear, activation, linear. [B, N, C] → [B, N, C]"""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.activate, factor = ACTIVATIONS[spec.activation]
        self.up = nn.Linear(spec.width, factor * spec.mlp_width, bias=spec.bias)
        self.down = nn.Linear(spec.mlp_width, spec.width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))
