"""Modulation tensors: shift, scale and gate of every norm and residual, from the conditioning vector.

Shapes: B batch, N image tokens, C width, S modulation tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit_deploy.spec import BlockSpec, ModelSpec

SINGLE_MODULATIONS = 3  # shift, scale, gate of a single block


class Modulation(nn.Module):
    """The modulation tensors of one stream, from the activated conditioning vector.

    [B, C_cond] → [B, 1, S·C], the S tensors side by side in the order that the block reads them.
    """

    def __init__(self, spec: ModelSpec, tensors: int):
        super().__init__()
        self.proj = nn.Linear(spec.cond_dim, tensors * spec.width, bias=spec.bias)

    def forward(self, conditioning: Tensor) -> Tensor:
        return self.proj(conditioning).unsqueeze(1)


class BlockModulation(nn.Module):
    """The modulation tensors of both streams of one block. [B, C_cond] → [B, 1, S_img·C], [B, 1, S_txt·C]"""

    def __init__(self, spec: ModelSpec, kind: BlockSpec):
        super().__init__()
        self.img = Modulation(spec, kind.img_modulations)
        self.txt = Modulation(spec, kind.txt_modulations)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        return self.img(conditioning), self.txt(conditioning)


class SharedModulation(BlockModulation):
    """The modulation tensors of all joint blocks, and of all single ones (FLUX.2)."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec, spec.blocks[0])
        self.single = Modulation(spec, SINGLE_MODULATIONS)


def by_token(modulation: Tensor, references: Tensor) -> Tensor:
    """What modulates each token: that at timestep 0 for references. [2·B, 1, C], [N, 1] → [B, N, C]"""
    batch = modulation.shape[0] // 2
    return torch.where(references, modulation[batch:], modulation[:batch])
