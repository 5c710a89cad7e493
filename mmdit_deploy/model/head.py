"""What becomes of the streams after the blocks: joined for single blocks, split again, and projected to velocity.

Shapes: B batch, N image tokens, M text tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit_deploy.model.layers import modulate
from mmdit_deploy.spec import ModelSpec


class Join(nn.Module):
    """``img`` [B, N, C], ``txt`` [B, M, C] → [B, N + M, C]"""

    def forward(self, img: Tensor, txt: Tensor) -> Tensor:
        return torch.cat([img, txt], dim=1)


class Split(nn.Module):
    """The image tokens of joined ones. ``tokens`` [B, N + M, C], ``img_ids`` [N, axes] → [B, N, C]"""

    def forward(self, tokens: Tensor, img_ids: Tensor) -> Tensor:
        return tokens[:, : img_ids.shape[0]]


class FinalLayer(nn.Module):
    """AdaLN and the projection to velocity; patches leave in channel, row, column order, as they came.

    ``hidden_states`` [B, N, C], ``modulation`` [B, 1, 2·C] → [B, N, C_out]
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.out_channels, self.patches = spec.out_channels, spec.patch_size > 1
        self.still_references = spec.still_references
        self.proj = nn.Linear(spec.width, spec.out_dim, bias=spec.bias)

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        if self.still_references:
            modulation = modulation[: hidden_states.shape[0]]  # the batch's own: nobody reads references any more
        scale, shift = modulation.chunk(2, -1)  # diffusers' AdaLayerNormContinuous stores scale first
        out: Tensor = self.proj(modulate(hidden_states, shift, scale))
        # The checkpoint's projection orders a patch (row, column, channel).
        return out.unflatten(-1, (-1, self.out_channels)).transpose(-1, -2).flatten(-2) if self.patches else out
