"""The reference MMDiT: embed, joint blocks, head. It reads like figure 2 of the SD3 paper (arXiv:2403.03206).

Shapes: B batch, N image tokens, M text tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdit_deploy.errors import SpecError
from mmdit_deploy.model.blocks import JointBlock, Modulation
from mmdit_deploy.model.embeddings import Conditioning, ImageEmbed, TextEmbed
from mmdit_deploy.model.layers import modulate
from mmdit_deploy.spec import BlockSpec, ModelSpec


class BlockModulation(nn.Module):
    """The modulation tensors of both streams of one block. [B, C_cond] → [B, 1, S_img·C], [B, 1, S_txt·C]"""

    def __init__(self, spec: ModelSpec, kind: BlockSpec):
        super().__init__()
        self.img = Modulation(spec.cond_dim, spec.width, kind.img_modulations)
        self.txt = Modulation(spec.cond_dim, spec.width, kind.txt_modulations)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        return self.img(conditioning), self.txt(conditioning)


class FinalLayer(nn.Module):
    """AdaLN and the projection to velocity; patches leave in channel, row, column order, as they came.

    ``hidden_states`` [B, N, C], ``modulation`` [B, 1, 2·C] → [B, N, C_out]
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.out_channels = spec.out_channels
        self.proj = nn.Linear(spec.width, spec.out_dim)

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, -1)  # diffusers' AdaLayerNormContinuous stores scale first
        patches = self.proj(modulate(hidden_states, shift, scale))
        # The checkpoint's projection orders a patch (row, column, channel).
        return patches.unflatten(-1, (-1, self.out_channels)).transpose(-1, -2).flatten(-2)


class MMDiT(nn.Module):
    """An MMDiT of SD3's kind, as its `ModelSpec` says."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.default_img_tokens, self.default_txt_tokens = 64, 32
        self.img_embed = ImageEmbed(spec)
        self.txt_embed = TextEmbed(spec)
        self.conditioning = Conditioning(spec)
        self.modulations = nn.ModuleList(BlockModulation(spec, kind) for kind in spec.blocks)
        self.final_modulation = Modulation(spec.cond_dim, spec.width, 2)
        self.blocks = nn.ModuleList(JointBlock(spec, kind) for kind in spec.blocks)
        self.final = FinalLayer(spec)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor | None = None,
        *,
        outputs: Sequence[str] = (),
    ) -> Tensor | tuple[Tensor, ...]:
        """Predict the velocity.

        Args:
            hidden_states: image tokens [B, N, C_in], a patch in channel, row, column order.
            encoder_hidden_states: text tokens [B, M, C_txt].
            timestep: [B], on the scale 0 to 1000.
            pooled_projections: [B, C_pooled].
            img_ids: rows and columns of the image tokens, 0-based, [N, 2] fp32; by default the row-major grid
                nearest to a square.
            outputs: names of block outputs to return as well, e.g. ``("blocks.3",)``: that block's image tokens
                [B, N, C].

        Returns:
            The velocity [B, N, C_out], in the order of `hidden_states`; with `outputs`, a tuple that starts with it.
        """
        wanted = {name: block_index(name, self.spec) for name in outputs}
        if img_ids is None:
            img_ids = nearest_square_ids(hidden_states.shape[1]).to(hidden_states.device)

        conditioning = self.conditioning(timestep, pooled_projections)
        img = self.img_embed(hidden_states, img_ids)
        txt = self.txt_embed(encoder_hidden_states)

        features = []
        for modulation, block in zip(self.modulations, self.blocks, strict=True):
            img, *rest = block(img, txt, *modulation(conditioning))
            (txt,) = rest or (txt,)
            features.append(img)

        sample: Tensor = self.final(img, self.final_modulation(conditioning))
        return (sample, *(features[i] for i in wanted.values())) if wanted else sample

    @staticmethod
    def build(
        img_dim: int,
        txt_dim: int,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        cond_dim: int | None = None,
        pooled_dim: int | None = None,
        img_tokens: int = 64,
        txt_tokens: int = 32,
    ) -> MMDiT:
        """A model from sizes alone: any image and text width, QK norm, one token per latent position.

        ``(img_latent [B, img_tokens, img_dim], txt_embed [B, txt_tokens, txt_dim], timestep [B],
        pooled_text [B, pooled_dim])`` → ``[B, img_tokens, img_dim]``. The token counts only say what
        `output_size` assumes by default: the model takes any.

        Args:
            cond_dim: width of the conditioning vector; `hidden_size` by default.
            pooled_dim: width of the pooled text; `txt_dim` by default.

        Raises:
            SpecError: a size breaks a rule, e.g. `hidden_size` is no multiple of `num_heads`.
        """
        if (
            not isinstance(num_heads, int)
            or num_heads < 1
            or not isinstance(hidden_size, int)
            or hidden_size % num_heads
        ):
            raise SpecError(
                "hidden_size must be a multiple of num_heads",
                received=f"hidden_size={hidden_size!r}, num_heads={num_heads!r}",
                fix="for heads of 64, set num_heads = hidden_size / 64",
            )
        for name, tokens in (("img_tokens", img_tokens), ("txt_tokens", txt_tokens)):
            if not isinstance(tokens, int) or tokens < 1:
                raise SpecError(f"{name} must be a whole number of at least 1", received=repr(tokens), fix="use 64")
        model = MMDiT(
            ModelSpec(
                name=f"mmdit-{depth}x{hidden_size}",
                depth=depth,
                num_heads=num_heads,
                head_dim=hidden_size // num_heads,
                latent_channels=img_dim,
                out_channels=img_dim,
                patch_size=1,
                txt_dim=txt_dim,
                pooled_dim=txt_dim if pooled_dim is None else pooled_dim,
                cond_dim=hidden_size if cond_dim is None else cond_dim,
                mlp_ratio=mlp_ratio,
            )
        )
        model.default_img_tokens, model.default_txt_tokens = img_tokens, txt_tokens
        return model

    @staticmethod
    def recommended_defaults() -> dict[str, int | float]:
        """The sizes that `build` takes where none are given (`cond_dim` and `pooled_dim` follow from others)."""
        return dict(hidden_size=768, depth=12, num_heads=12, mlp_ratio=4, img_tokens=64, txt_tokens=32)

    def output_size(self, batch: int = 1, img_tokens: int | None = None) -> tuple[int, int, int]:
        """Shape of the velocity, [batch, img_tokens, out_dim], for a batch of images."""
        return batch, self.default_img_tokens if img_tokens is None else img_tokens, self.spec.out_dim


def nearest_square_ids(tokens: int) -> Tensor:
    """Rows and columns of the row-major grid of that many tokens that is nearest to a square: [tokens, 2] fp32.

    12 tokens are 3 rows of 4; a prime number is one row.
    """
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return grid_ids(rows, tokens // rows)


def grid_ids(rows: int, cols: int) -> Tensor:
    """Rows and columns of a row-major grid: [rows·cols, 2] fp32, 0-based."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).reshape(-1, 2).float()


def block_index(name: str, spec: ModelSpec) -> int:
    """The block that an output name such as ``blocks.12`` means.

    Raises:
        SpecError: the name is none of the model's blocks.
    """
    prefix, _, index = name.partition(".")
    # One name per block: `blocks.01` would be an output that no call makes.
    if prefix != "blocks" or index not in map(str, range(spec.depth)):
        raise SpecError(
            f"an output is named blocks.0 to blocks.{spec.depth - 1}",
            received=repr(name),
            fix="name a block of this model",
        )
    return int(index)
