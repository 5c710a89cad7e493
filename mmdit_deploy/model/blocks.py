"""The joint block: a pure function of two token streams, their modulation tensors, and weights.

Shapes: B batch, N image tokens, M text tokens, C width, H heads, D head width, S modulation tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit_deploy.model.layers import MLP, QKV, attention, modulate
from mmdit_deploy.spec import BlockSpec, ModelSpec


class Modulation(nn.Module):
    """The modulation tensors of one stream, from the activated conditioning vector.

    [B, C_cond] → [B, 1, S·C], the S tensors side by side in the order that the block reads them.
    """

    def __init__(self, cond_dim: int, width: int, tensors: int):
        super().__init__()
        self.proj = nn.Linear(cond_dim, tensors * width)

    def forward(self, conditioning: Tensor) -> Tensor:
        return self.proj(conditioning).unsqueeze(1)


class Stream(nn.Module):
    """The weights of one stream (image or text) in a joint block; a stream that ends has only its QKV."""

    def __init__(self, spec: ModelSpec, *, ends: bool = False, dual_attention: bool = False):
        super().__init__()
        width = spec.width
        self.qkv = QKV(width, spec.num_heads, qk_norm=spec.qk_norm)
        if not ends:
            self.attn_out = nn.Linear(width, width)
            self.mlp = MLP(width, spec.mlp_width)
        if dual_attention:
            self.qkv2 = QKV(width, spec.num_heads, qk_norm=spec.qk_norm)
            self.attn2_out = nn.Linear(width, width)


class JointBlock(nn.Module):
    """Both streams attend over each other's tokens; all else is per stream (SD3 paper, figure 2b).

    forward: ``hidden_states`` [B, N, C], ``encoder_hidden_states`` [B, M, C], ``img_modulation`` [B, 1, S·C],
    ``txt_modulation`` [B, 1, S·C] → the two streams; the text stream's is absent where it ends.
    """

    def __init__(self, spec: ModelSpec, kind: BlockSpec):
        super().__init__()
        self.kind = kind
        self.img = Stream(spec, dual_attention=kind.dual_attention)
        self.txt = Stream(spec, ends=kind.text_ends)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        img_modulation: Tensor,
        txt_modulation: Tensor,
    ) -> tuple[Tensor, ...]:
        img, txt, kind = hidden_states, encoder_hidden_states, self.kind
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = img_modulation.chunk(kind.img_modulations, -1)
        if kind.text_ends:  # diffusers' AdaLayerNormContinuous stores scale first
            txt_scale, txt_shift = txt_modulation.chunk(2, -1)
        else:
            txt_shift, txt_scale, *txt_rest = txt_modulation.chunk(6, -1)

        img_qkv = self.img.qkv(modulate(img, shift, scale))
        txt_qkv = self.txt.qkv(modulate(txt, txt_shift, txt_scale))
        attended = attention(*(torch.cat(pair, dim=1) for pair in zip(img_qkv, txt_qkv, strict=True)))
        img_attended, txt_attended = attended[:, : img.shape[1]], attended[:, img.shape[1] :]

        if kind.dual_attention:
            shift2, scale2, gate2 = dual
            attended2 = attention(*self.img.qkv2(modulate(img, shift2, scale2)))
        img = img + gate * self.img.attn_out(img_attended)
        if kind.dual_attention:
            img = img + gate2 * self.img.attn2_out(attended2)
        img = img + gate_mlp * self.img.mlp(modulate(img, shift_mlp, scale_mlp))
        if kind.text_ends:
            return (img,)

        txt_gate, txt_shift_mlp, txt_scale_mlp, txt_gate_mlp = txt_rest
        txt = txt + txt_gate * self.txt.attn_out(txt_attended)
        txt = txt + txt_gate_mlp * self.txt.mlp(modulate(txt, txt_shift_mlp, txt_scale_mlp))
        return img, txt
