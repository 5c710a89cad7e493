"""Joint and single blocks: pure functions of token streams, their modulation tensors, positions, and weights.

Shapes: B batch, N image tokens, M text tokens, T = N + M tokens (image before text), C width, H heads, D head width, S
modulation tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit_deploy.model.layers import ACTIVATIONS, MLP, QKV, RMSNorm, attention, finite, modulate, rotate
from mmdit_deploy.model.modulation import SINGLE_MODULATIONS, by_token
from mmdit_deploy.spec import BlockSpec, ModelSpec


class Stream(nn.Module):
    """The weights of one stream (image or text) in a joint block; a stream that ends has only its QKV."""

    def __init__(self, spec: ModelSpec, *, ends: bool = False, dual_attention: bool = False):
        super().__init__()
        width = spec.width
        self.qkv = QKV(spec)
        if not ends:
            self.attn_out = nn.Linear(width, width, bias=spec.bias)
            self.mlp = MLP(spec)
        if dual_attention:
            self.qkv2 = QKV(spec)
            self.attn2_out = nn.Linear(width, width, bias=spec.bias)


class JointBlock(nn.Module):
    """Both streams attend over each other's tokens; all else is per stream (SD3 paper, figure 2b).

    forward: ``hidden_states`` [B, N, C], ``encoder_hidden_states`` [B, M, C], ``img_modulation`` [B, 1, S·C],
    ``txt_modulation`` [B, 1, S·C], and where the model has them ``cos`` and ``sin`` [T, D/2] of the tokens' angles,
    ``attention_mask`` [B, 1, 1, T], ``references`` [N, 1], ``residual`` [B, N, C] → the two streams; the text stream's
    is absent where nothing reads it. With ``references`` the modulations are [2·B, 1, S·C], those of the batch and then
    those at timestep 0.
    """

    def __init__(self, spec: ModelSpec, kind: BlockSpec):
        super().__init__()
        self.kind = kind
        self.img = Stream(spec, dual_attention=kind.dual_attention)
        self.txt = Stream(spec, ends=kind.text_ends)
        self.finite = finite(spec)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        img_modulation: Tensor,
        txt_modulation: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        attention_mask: Tensor | None = None,
        references: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        img, txt, kind = hidden_states, encoder_hidden_states, self.kind
        img_modulations = img_modulation.chunk(kind.img_modulations, -1)
        if references is not None:
            img_modulations = tuple(by_token(m, references) for m in img_modulations)
            txt_modulation = txt_modulation[: txt.shape[0]]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = img_modulations
        if kind.text_ends:  # diffusers' AdaLayerNormContinuous stores scale first
            txt_scale, txt_shift = txt_modulation.chunk(2, -1)
        else:
            txt_shift, txt_scale, *txt_rest = txt_modulation.chunk(6, -1)

        img_qkv = self.img.qkv(modulate(img, shift, scale))
        txt_qkv = self.txt.qkv(modulate(txt, txt_shift, txt_scale))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(img_qkv, txt_qkv, strict=True))
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = attention(q, k, v, attention_mask)
        img_attended, txt_attended = attended[:, : img.shape[1]], attended[:, img.shape[1] :]

        if kind.dual_attention:
            shift2, scale2, gate2 = dual
            attended2 = attention(*self.img.qkv2(modulate(img, shift2, scale2)))
        img = img + gate * self.img.attn_out(img_attended)
        if kind.dual_attention:
            img = img + gate2 * self.img.attn2_out(attended2)
        img = self.finite(img + gate_mlp * self.img.mlp(modulate(img, shift_mlp, scale_mlp)))
        if residual is not None:
            img = img + residual
        if not kind.makes_text:
            return (img,)

        txt_gate, txt_shift_mlp, txt_scale_mlp, txt_gate_mlp = txt_rest
        txt = txt + txt_gate * self.txt.attn_out(txt_attended)
        txt = self.finite(txt + txt_gate_mlp * self.txt.mlp(modulate(txt, txt_shift_mlp, txt_scale_mlp)))
        return img, txt


class SingleBlock(nn.Module):
    """One stream of all tokens, attention and MLP side by side: one projection into both, one out of both (FLUX).

    forward: ``hidden_states`` [B, T, C], ``modulation`` [B, 1, 3·C], and where the model has them ``cos`` and ``sin``
    [T, D/2], ``attention_mask`` [B, 1, 1, T] → [B, T, C]
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.num_heads, self.width = spec.num_heads, spec.width
        self.activate, factor = ACTIVATIONS[spec.activation]
        self.proj = nn.Linear(spec.width, 3 * spec.width + factor * spec.mlp_width, bias=spec.bias)
        self.norm_q = RMSNorm(spec.head_dim) if spec.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(spec.head_dim) if spec.qk_norm else nn.Identity()
        self.out = nn.Linear(spec.width + spec.mlp_width, spec.width, bias=spec.bias)
        self.finite = finite(spec)

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        shift, scale, gate = modulation.chunk(SINGLE_MODULATIONS, -1)
        projected = self.proj(modulate(hidden_states, shift, scale))
        *qkv, mlp = projected.split([self.width] * 3 + [projected.shape[-1] - 3 * self.width], dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in qkv)
        q, k = self.norm_q(q), self.norm_k(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        both = torch.cat([attention(q, k, v, attention_mask), self.activate(mlp)], dim=-1)
        out: Tensor = self.finite(hidden_states + gate * self.out(both))
        return out
