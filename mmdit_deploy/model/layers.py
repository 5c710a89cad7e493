"""The parts that every MMDiT block is made of.

Shapes: B batch, N tokens, C channels (the model's width), H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Every norm of SD3 and SD3.5 has this epsilon (diffusers JointTransformerBlock, AdaLayerNormContinuous).
EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


def attention(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
    """Softmax attention with scale 1/√D, over all tokens.

    Returns:
        [B, N, H·D]
    """
    q_BHND, k_BHND, v_BHND = (t.transpose(1, 2) for t in (q_BNHD, k_BNHD, v_BNHD))
    out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)
    return out_BHND.transpose(1, 2).flatten(2)


def modulate(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """AdaLN (Peebles & Xie 2023, arXiv:2212.09748): a norm without weights, then scale and shift per sample."""
    return F.layer_norm(x_BNC, (x_BNC.shape[-1],), eps=EPS) * (1 + scale_B1C) + shift_B1C


class QKV(nn.Module):
    """One projection to Q, K and V, with optional RMSNorm on each head's Q and K.

    [B, N, C] → three of [B, N, H, D]
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(width, 3 * width)
        head_dim = width // num_heads
        self.norm_q = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim) if qk_norm else nn.Identity()

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BNHD, k_BNHD, v_BNHD = (t.unflatten(-1, (self.num_heads, -1)) for t in self.proj(x_BNC).chunk(3, dim=-1))
        return self.norm_q(q_BNHD), self.norm_k(k_BNHD), v_BNHD


class MLP(nn.Module):
    """Linear, tanh-GELU, linear. [B, N, C] → [B, N, C]"""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))
