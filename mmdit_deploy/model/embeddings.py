"""What enters the blocks: image tokens with positions, text tokens, and the conditioning vector.

Shapes: B batch, N image tokens, M text tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit_deploy.spec import ModelSpec

MAX_PERIOD = 10_000.0  # of every sinusoid (Vaswani et al. 2017, section 3.5; DDPM)
TIMESTEP_CHANNELS = 256  # diffusers CombinedTimestepTextProjEmbeddings


def frequencies(count: int) -> Tensor:
    """``10000^(-i/count)`` for i = 0 … count-1, computed in fp64 and rounded once to fp32: [count].

    A table, not a formula in the graph: runtimes differ in the last bit of `exp`, and a timestep of 1000
    multiplies that difference.
    """
    exponents = torch.arange(count, dtype=torch.float64, device="cpu") / count
    return (MAX_PERIOD**-exponents).to(torch.float32)


class TimestepEmbed(nn.Module):
    """Sinusoids of the timestep (cosines first), then a two-layer MLP. [B] → [B, C_cond]"""

    frequencies: Tensor

    def __init__(self, cond_dim: int):
        super().__init__()
        self.up = nn.Linear(TIMESTEP_CHANNELS, cond_dim)
        self.down = nn.Linear(cond_dim, cond_dim)
        self.register_buffer("frequencies", frequencies(TIMESTEP_CHANNELS // 2), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        # fp32: bf16 cannot represent timestep 999, and fp16 angles are off by half a radian there.
        angles = timestep.float()[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.down(F.silu(self.up(waves.to(self.up.weight.dtype))))


class Conditioning(nn.Module):
    """The activated conditioning vector: SiLU(timestep embedding + pooled text embedding).

    ``timestep`` [B] on the scale 0 to 1000, ``pooled_projections`` [B, C_pooled] → [B, C_cond]

    The SiLU is each modulation's in the paper's figure; here it is done once.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.time = TimestepEmbed(spec.cond_dim)
        self.pooled_up = nn.Linear(spec.pooled_dim, spec.cond_dim)
        self.pooled_down = nn.Linear(spec.cond_dim, spec.cond_dim)

    def forward(self, timestep: Tensor, pooled_projections: Tensor) -> Tensor:
        return F.silu(self.time(timestep) + self.pooled_down(F.silu(self.pooled_up(pooled_projections))))


class SincosPositions(nn.Module):
    """2-D sinusoids: columns in the first half of the channels, rows in the second, sines before cosines.

    ``img_ids`` [N, 2], 0-based rows and columns → [N, C] in fp32. The image's grid is the centre crop of a
    ``max_size``² grid, scaled so that ``base_size`` positions span it (SD3 paper, section 5.3.2;
    diffusers PatchEmbed.cropped_pos_embed).
    """

    frequencies: Tensor

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.max_size = spec.pos_max_size
        self.shrink = spec.pos_max_size / spec.pos_base_size
        self.register_buffer("frequencies", frequencies(spec.width // 4), persistent=False)

    def forward(self, img_ids: Tensor) -> Tensor:
        return self.at(img_ids + crop_offset(img_ids, self.max_size))

    def at(self, grid_ids: Tensor) -> Tensor:
        """The sinusoids at rows and columns of the ``max_size``² grid itself: [N, 2] → [N, C]."""
        row_angles, col_angles = (p[:, None] * self.frequencies for p in (grid_ids / self.shrink).unbind(-1))
        return torch.cat([col_angles.sin(), col_angles.cos(), row_angles.sin(), row_angles.cos()], dim=-1)


class TablePositions(nn.Module):
    """Positions from a checkpoint's own table, where it differs from the formula.

    ``img_ids`` [N, 2] → [N, C]: the centre crop of the ``max_size``² table.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.max_size = spec.pos_max_size
        self.table = nn.Parameter(torch.zeros(spec.max_img_tokens, spec.width))

    def forward(self, img_ids: Tensor) -> Tensor:
        rows, cols = (img_ids + crop_offset(img_ids, self.max_size)).unbind(-1)
        return self.table[(rows * self.max_size + cols).long()]


def crop_offset(img_ids: Tensor, max_size: int) -> Tensor:
    """Where the centre crop of a ``max_size``² grid begins: [2], rows and columns. ``img_ids`` [N, 2]"""
    return torch.floor((max_size - 1 - img_ids.amax(dim=0)) / 2)


class ImageEmbed(nn.Module):
    """Image tokens, projected, plus their positions.

    ``hidden_states`` [B, N, C_in], ``img_ids`` [N, 2] → [B, N, C]
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.proj = nn.Linear(spec.img_dim, spec.width)
        self.positions = TablePositions(spec) if spec.pos_table else SincosPositions(spec)

    def forward(self, hidden_states: Tensor, img_ids: Tensor) -> Tensor:
        positions: Tensor = self.positions(img_ids)
        return self.proj(hidden_states) + positions.to(hidden_states.dtype)


class TextEmbed(nn.Module):
    """``encoder_hidden_states`` [B, M, C_txt] → [B, M, C]"""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.proj = nn.Linear(spec.txt_dim, spec.width)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        return self.proj(encoder_hidden_states)
