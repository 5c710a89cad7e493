"""What enters the blocks: image tokens with positions, text tokens, and the conditioning vector.

Shapes: B batch, N image tokens, M text tokens, C width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit_deploy.model.layers import FP16_MAX, RMSNorm
from mmdit_deploy.spec import ModelSpec

MAX_PERIOD = 10_000.0  # of every sinusoid (Vaswani et al. 2017, section 3.5; DDPM)
TIMESTEP_CHANNELS = 256  # diffusers CombinedTimestepTextProjEmbeddings


def frequencies(count: int, base: float = MAX_PERIOD) -> Tensor:
    """``base^(-i/count)`` for i = 0 … count-1, computed in fp64 and rounded once to fp32: [count].

    A table, not a formula in the graph: runtimes differ in the last bit of `exp`, and a timestep of 1000
    multiplies that difference.
    """
    exponents = torch.arange(count, dtype=torch.float64, device="cpu") / count
    return (base**-exponents).to(torch.float32)


def timestep_frequencies() -> Tensor:
    """The frequencies of timestep and guidance embeddings: [TIMESTEP_CHANNELS / 2].

    The exponents are rounded to fp32, as in every published implementation (diffusers get_timestep_embedding, BFL's
    timestep_embedding): at a guidance of 5 on FLUX's scale, exact ones would turn the fastest wave by 5e-4.
    """
    count = TIMESTEP_CHANNELS // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(count, dtype=torch.float32, device="cpu") / count
    return exponents.double().exp().to(torch.float32)


class Embedder(nn.Module):
    """Linear, SiLU, linear. [B, C_in] → [B, C_cond]"""

    def __init__(self, dim: int, spec: ModelSpec):
        super().__init__()
        self.up = nn.Linear(dim, spec.cond_dim, bias=spec.bias)
        self.down = nn.Linear(spec.cond_dim, spec.cond_dim, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class ScalarEmbedder(Embedder):
    """Sinusoids of a timestep or a guidance scale (cosines first), then the two layers. [B] → [B, C_cond]"""

    frequencies: Tensor

    def __init__(self, spec: ModelSpec):
        super().__init__(TIMESTEP_CHANNELS, spec)
        self.scale = spec.time_scale
        self.register_buffer("frequencies", timestep_frequencies(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # fp32: bf16 cannot represent timestep 999, and fp16 angles are off by half a radian there.
        scaled = x.float() if self.scale == 1 else x.float() * self.scale
        angles = scaled[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return super().forward(waves.to(self.up.weight.dtype))


class Conditioning(nn.Module):
    """The activated conditioning vector: SiLU of the sum of the embedded timestep, guidance and pooled text.

    ``timestep`` [B], ``pooled_projections`` [B, C_pooled], ``guidance`` [B], where the model has them → [B, C_cond];
    where reference tokens stay at timestep 0, [2·B, C_cond]: the batch, and then the batch at timestep 0.

    The SiLU is each modulation's in the paper's figure; here it is done once.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.time = ScalarEmbedder(spec)
        self.guidance = ScalarEmbedder(spec) if spec.guidance else None
        self.pooled = Embedder(spec.pooled_dim, spec) if spec.pooled_dim else None
        self.still_references = spec.still_references

    def forward(
        self, timestep: Tensor, pooled_projections: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        if self.still_references:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
        conditioning: Tensor = self.time(timestep)
        if self.guidance is not None:
            conditioning = conditioning + self.guidance(guidance)
        if self.pooled is not None:
            conditioning = conditioning + self.pooled(pooled_projections)
        return F.silu(conditioning)


class RotaryPositions(nn.Module):
    """Cosines and sines of RoPE's angles, image tokens before text tokens.

    ``img_ids`` [N, axes], ``txt_ids`` [M, axes] fp32 → two of [N + M, D/2] in fp32. Each axis turns its share of the
    channels of a head (FLUX's EmbedND, diffusers FluxPosEmbed and QwenEmbedRope).
    """

    frequencies: Tensor

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.pairs = [axis // 2 for axis in spec.rope_axes]
        table = torch.cat([frequencies(count, spec.rope_theta) for count in self.pairs])
        self.register_buffer("frequencies", table, persistent=False)

    def forward(self, img_ids: Tensor, txt_ids: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.cat([img_ids, txt_ids]).split(1, dim=-1)
        parts = zip(columns, self.frequencies.split(self.pairs), strict=True)
        angles = torch.cat([column * frequencies for column, frequencies in parts], dim=-1)
        return angles.cos(), angles.sin()


class AttentionMask(nn.Module):
    """What to add to the scores of each token, as a key: text tokens that are masked out get no attention.

    ``encoder_hidden_states_mask`` [B, M] bool, ``img_ids`` [N, axes] → [B, 1, 1, N + M], image tokens before text

    Added numbers, and in fp16's range: TensorRT takes a bool mask with eight more kernels, and any precision's scores
    stay far above -65504. There are always image tokens, so that no row is all masked.
    """

    def forward(self, encoder_hidden_states_mask: Tensor, img_ids: Tensor) -> Tensor:
        masked = torch.where(encoder_hidden_states_mask, 0.0, -FP16_MAX).to(torch.get_default_dtype())
        img = torch.zeros_like(img_ids[:, 0], dtype=masked.dtype).expand(masked.shape[0], -1)
        return torch.cat([img, masked], dim=-1)[:, None, None]


class References(nn.Module):
    """Which image tokens are those of reference images. ``img_ids`` [N, axes] → [N, 1] bool"""

    def forward(self, img_ids: Tensor) -> Tensor:
        return img_ids[:, :1] > 0


class Residuals(nn.Module):
    """A ControlNet's residuals, one by one. ``block_controlnet_hidden_states`` [K, B, N, C] → K of [B, N, C]"""

    def forward(self, block_controlnet_hidden_states: Tensor) -> tuple[Tensor, ...]:
        return block_controlnet_hidden_states.unbind(0)


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
        self.table = nn.Parameter(torch.zeros(spec.pos_max_size**2, spec.width))

    def forward(self, img_ids: Tensor) -> Tensor:
        rows, cols = (img_ids + crop_offset(img_ids, self.max_size)).unbind(-1)
        return self.table[(rows * self.max_size + cols).long()]


def crop_offset(img_ids: Tensor, max_size: int) -> Tensor:
    """Where the centre crop of a ``max_size``² grid begins: [2], rows and columns. ``img_ids`` [N, 2]"""
    return torch.floor((max_size - 1 - img_ids.amax(dim=0)) / 2)


class ImageEmbed(nn.Module):
    """Image tokens, projected, plus their positions where the model adds them.

    ``hidden_states`` [B, N, C_in], ``img_ids`` [N, 2] → [B, N, C]
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.proj = nn.Linear(spec.img_dim, spec.width, bias=spec.bias)
        self.positions: nn.Module | None = None
        if spec.pos_max_size:
            self.positions = TablePositions(spec) if spec.pos_table else SincosPositions(spec)

    def forward(self, hidden_states: Tensor, img_ids: Tensor | None = None) -> Tensor:
        img: Tensor = self.proj(hidden_states)
        return img if self.positions is None else img + self.positions(img_ids).to(img.dtype)


class TextEmbed(nn.Module):
    """Text tokens, normed where the model does, and projected. ``encoder_hidden_states`` [B, M, C_txt] → [B, M, C]"""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.norm = RMSNorm(spec.txt_dim) if spec.txt_norm else nn.Identity()
        self.proj = nn.Linear(spec.txt_dim, spec.width, bias=spec.bias)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        return self.proj(self.norm(encoder_hidden_states))
