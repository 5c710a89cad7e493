"""The reference MMDiT: embed, joint blocks, single blocks, head. It reads like figure 2 of the SD3 paper
(arXiv:2403.03206), with the single blocks of FLUX.

Shapes: B batch, N image tokens, M text tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmdit_deploy.errors import SpecError
from mmdit_deploy.families import position_ids
from mmdit_deploy.families.family import grid
from mmdit_deploy.model.blocks import JointBlock, SingleBlock
from mmdit_deploy.model.embeddings import (
    AttentionMask,
    Conditioning,
    ImageEmbed,
    References,
    Residuals,
    RotaryPositions,
    TextEmbed,
)
from mmdit_deploy.model.head import FinalLayer, Join, Split
from mmdit_deploy.model.modulation import SINGLE_MODULATIONS, BlockModulation, Modulation, SharedModulation
from mmdit_deploy.spec import ModelSpec


class MMDiT(nn.Module):
    """An MMDiT, as its `ModelSpec` says."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.default_img_tokens, self.default_txt_tokens = 64, 32
        self.img_embed = ImageEmbed(spec)
        self.txt_embed = TextEmbed(spec)
        self.conditioning = Conditioning(spec)
        self.positions = RotaryPositions(spec) if spec.rope_axes else None
        self.attention_mask = AttentionMask() if spec.txt_mask else None
        self.references = References() if spec.still_references else None
        self.residuals = Residuals() if spec.residuals else None
        self.shared_modulation = SharedModulation(spec) if spec.shared_modulation else None
        own = () if spec.shared_modulation else spec.blocks
        self.modulations = nn.ModuleList(BlockModulation(spec, kind) for kind in own)
        own_single = 0 if spec.shared_modulation else spec.single_depth
        self.single_modulations = nn.ModuleList(Modulation(spec, SINGLE_MODULATIONS) for _ in range(own_single))
        self.final_modulation = Modulation(spec, 2)
        self.blocks = nn.ModuleList(JointBlock(spec, kind) for kind in spec.blocks)
        if spec.single_depth:
            self.join, self.split = Join(), Split()
        self.single_blocks = nn.ModuleList(SingleBlock(spec) for _ in range(spec.single_depth))
        self.final = FinalLayer(spec)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor | None = None,
        img_ids: Tensor | None = None,
        *,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        block_controlnet_hidden_states: Tensor | None = None,
        outputs: Sequence[str] = (),
    ) -> Tensor | tuple[Tensor, ...]:
        """Predict the velocity.

        Args:
            hidden_states: image tokens [B, N, C_in], a patch in channel, row, column order.
            encoder_hidden_states: text tokens [B, M, C_txt].
            timestep: [B], on the scale 0 to 1000 / `ModelSpec.time_scale`.
            pooled_projections: [B, C_pooled], where the model has a pooled vector.
            img_ids, txt_ids: positions of the tokens, [N, axes] and [M, axes] fp32, as
                `mmdit_deploy.families.position_ids` makes them; by default those of the row-major grid nearest to a
                square.
            guidance: guidance scale [B], where the model has it.
            encoder_hidden_states_mask: which text tokens count, [B, M] bool, where the model has a mask; by default
                all.
            block_controlnet_hidden_states: a ControlNet's residuals [K, B, N, C], where the model takes them.
            outputs: names of block outputs to return as well, e.g. ``("blocks.3",)``: that block's image tokens
                [B, N, C]; of a single block, its image and text tokens [B, N + M, C].

        Returns:
            The velocity [B, N, C_out], in the order of `hidden_states`; with `outputs`, a tuple that starts with it.

        Raises:
            SpecError: an output is none of the model's blocks, or an input that the model reads is missing.
        """
        for name in outputs:
            check_block(name, self.spec)
        if img_ids is None and txt_ids is None:
            img_ids, txt_ids = self._default_ids(hidden_states, encoder_hidden_states)
        elif img_ids is None or (self.positions is not None and txt_ids is None):
            raise SpecError(
                "img_ids and txt_ids say positions together",
                received=f"{'txt_ids' if img_ids is None else 'img_ids'} alone",
                fix="pass both, as mmdit_deploy.families.position_ids makes them, or neither",
            )

        self._check_inputs(
            {
                "pooled_projections": pooled_projections,
                "guidance": guidance,
                "encoder_hidden_states_mask": encoder_hidden_states_mask,
                "block_controlnet_hidden_states": block_controlnet_hidden_states,
            }
        )

        conditioning = self.conditioning(timestep, pooled_projections, guidance)
        img = self.img_embed(hidden_states, img_ids)
        txt = self.txt_embed(encoder_hidden_states)
        everywhere = {}  # what every block reads
        if self.positions is not None:
            everywhere["cos"], everywhere["sin"] = self.positions(img_ids, txt_ids)
        if self.attention_mask is not None and encoder_hidden_states_mask is not None:
            everywhere["attention_mask"] = self.attention_mask(encoder_hidden_states_mask, img_ids)
        if self.references is not None:
            everywhere["references"] = self.references(img_ids)
        residuals = () if self.residuals is None else self.residuals(block_controlnet_hidden_states)

        features: dict[str, Tensor] = {}
        modulations, single_modulations = self._modulate(conditioning)
        for i, (modulation, block) in enumerate(zip(modulations, self.blocks, strict=True)):
            own = {"residual": residuals[self.spec.residual_of(i)]} if self.spec.blocks[i].residual else {}
            img, *rest = block(img, txt, *modulation, **everywhere, **own)
            (txt,) = rest or (txt,)
            features[f"blocks.{i}"] = img

        if self.spec.single_depth:
            tokens = self.join(img, txt)
            for i, (modulation, block) in enumerate(zip(single_modulations, self.single_blocks, strict=True)):
                tokens = block(tokens, *modulation, **everywhere)
                features[f"single_blocks.{i}"] = tokens
            img = self.split(tokens, img_ids)

        sample: Tensor = self.final(img, self.final_modulation(conditioning))
        return (sample, *(features[name] for name in outputs)) if outputs else sample

    def _modulate(self, conditioning: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """The modulation tensors of each joint block, and of each single one; shared ones are made once."""
        if self.shared_modulation is not None:
            joint, single = self.shared_modulation(conditioning), self.shared_modulation.single(conditioning)
            return [joint] * self.spec.depth, [(single,)] * self.spec.single_depth
        return [m(conditioning) for m in self.modulations], [(m(conditioning),) for m in self.single_modulations]

    def _check_inputs(self, given: Mapping[str, Tensor | None]) -> None:
        """What a model of this spec reads is there.

        Raises:
            SpecError: it is not.
        """
        spec = self.spec
        needed = {
            "pooled_projections": bool(spec.pooled_dim),
            "guidance": spec.guidance,
            "block_controlnet_hidden_states": bool(spec.residuals),
        }
        missing = [name for name, reads in needed.items() if reads and given[name] is None]
        if missing:
            raise SpecError(f"{spec.name} reads {', '.join(missing)}", received="None", fix="pass it")
        mask = given["encoder_hidden_states_mask"]
        if mask is not None and mask.dtype != torch.bool:
            raise SpecError(
                "encoder_hidden_states_mask is bool: True where a token counts",
                received=str(mask.dtype).removeprefix("torch."),
                fix="mask.bool()",
            )

    def _default_ids(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the row-major grid that is nearest to a square."""
        ids = position_ids(self.spec, [nearest_square(hidden_states.shape[1])], encoder_hidden_states.shape[1])
        img_ids, txt_ids = (torch.from_numpy(i).to(hidden_states.device) for i in ids)
        return img_ids, txt_ids

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


def nearest_square(tokens: int) -> tuple[int, int]:
    """Rows and columns of the grid of that many tokens that is nearest to a square.

    12 tokens are 3 rows of 4; a prime number is one row.
    """
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return rows, tokens // rows


def grid_ids(rows: int, cols: int) -> Tensor:
    """Rows and columns of a row-major grid: [rows·cols, 2] fp32, 0-based."""
    return torch.from_numpy(grid(rows, cols))


def check_block(name: str, spec: ModelSpec) -> None:
    """Check that an output name such as ``blocks.12`` means a block.

    Raises:
        SpecError: the name is none of the model's blocks.
    """
    if name not in spec.block_names:
        single = f" and single_blocks.0 to single_blocks.{spec.single_depth - 1}" if spec.single_depth else ""
        raise SpecError(
            f"an output is named blocks.0 to blocks.{spec.depth - 1}{single}",
            received=repr(name),
            fix="name a block of this model",
        )
