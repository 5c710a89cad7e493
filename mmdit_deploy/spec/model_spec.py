"""`ModelSpec`: everything that decides the architecture of an MMDiT, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from mmdit_deploy.errors import SpecError

MAX_DEPTH = 128


@dataclass(frozen=True)
class BlockSpec:
    """The structure of one joint block. Blocks of equal specs are of one *kind* and share one traced function.

    Args:
        dual_attention: the image stream has a second attention over itself (SD3.5-Medium's first blocks).
        text_ends: the text stream ends after its attention input (the last block of SD3 and SD3.5).
        text_unread: the block could make text tokens, but nothing would read them (the last block of Qwen-Image).
        residual: a ControlNet's residual is added to the image stream after the block.
    """

    dual_attention: bool = False
    text_ends: bool = False
    text_unread: bool = False
    residual: bool = False

    @property
    def img_modulations(self) -> int:
        """Modulation tensors of the image stream: (shift, scale, gate) per attention and for the MLP."""
        return 9 if self.dual_attention else 6

    @property
    def txt_modulations(self) -> int:
        """Modulation tensors of the text stream; a stream that ends needs only (scale, shift)."""
        return 2 if self.text_ends else 6

    @property
    def makes_text(self) -> bool:
        """Whether the text stream goes on."""
        return not (self.text_ends or self.text_unread)

    @property
    def attentions(self) -> int:
        return 2 if self.dual_attention else 1


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of one MMDiT (Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2) or of its kin.

    Args:
        name: how the bundle and the report call the model.
        depth: number of joint blocks, 1 to 128.
        num_heads: attention heads.
        head_dim: width of a head; the model's width is ``num_heads * head_dim``.
        family: whose checkpoints it has, by name in `mmdit_deploy.families`: how weights are called and stored. Nothing
            that is computed depends on it.
        single_depth: number of single blocks, after the joint ones; 0 to 128 (FLUX).
        latent_channels: channels of the latent image; an image token has ``latent_channels * patch_size**2``.
        out_channels: channels of the predicted velocity.
        patch_size: side of the square patch that becomes one token; 1 where latents are packed before the model.
        txt_dim: width of the text encoder's tokens.
        pooled_dim: width of the pooled text vector; 0 for none.
        guidance: the guidance scale is an input, embedded like the timestep (guidance-distilled models).
        time_scale: what timestep and guidance are multiplied with before they are embedded: 1 where the timestep is
            on the scale 0 to 1000, 1000 where it is on the scale 0 to 1.
        cond_dim: width of the conditioning vector; 0 means the model's width, as in SD3.
        mlp_ratio: hidden width of the MLPs over the model's width.
        activation: of the MLPs: ``gelu`` (tanh) or ``swiglu``.
        bias: linear layers have biases.
        qk_norm: RMSNorm with a learned weight on every head's Q and K (SD3.5; not SD3-Medium).
        txt_norm: RMSNorm with a learned weight on the text tokens, before their projection (Qwen-Image).
        txt_mask: which text tokens are attended to is an input (Qwen-Image).
        text_ends: the last joint block makes no text tokens (SD3).
        still_references: tokens of reference images, those with a first position id above 0, are modulated as at
            timestep 0 (Qwen-Image-Edit-2511's ``zero_cond_t``).
        shared_modulation: one set of modulation tensors for all joint blocks, one for all single ones (FLUX.2).
        fp16_clip: in fp16, what a block returns is clipped to the finite numbers (FLUX, Qwen-Image).
        dual_attention_blocks: indices of the blocks with a second image attention (SD3.5-Medium: 0 to 12).
        rope_axes: channels of a head that each axis of the position ids rotates (FLUX: 16, 56, 56); none: no RoPE.
        rope_theta: base of RoPE's frequencies.
        pos_max_size: rows and columns of the grid that image positions are cropped from (SD3: 192); 0 where positions
            are not added to the image tokens.
        pos_base_size: rows and columns that the positions are scaled to (SD3: 64, 1024 px).
        pos_table: positions come from the checkpoint's own table, because it differs from the formula.
        residuals: residuals that a ControlNet adds to the image stream, in one stacked input; 0 for none.

    Raises:
        SpecError: a value breaks a rule; the message says which, what was received, and the fix.
    """

    name: str
    depth: int
    num_heads: int
    head_dim: int = 64
    family: str = "sd3"
    single_depth: int = 0
    latent_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    txt_dim: int = 4096
    pooled_dim: int = 2048
    guidance: bool = False
    time_scale: float = 1.0
    cond_dim: int = 0
    mlp_ratio: float = 4.0
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qk_norm: bool = True
    txt_norm: bool = False
    txt_mask: bool = False
    text_ends: bool = True
    still_references: bool = False
    shared_modulation: bool = False
    fp16_clip: bool = False
    dual_attention_blocks: tuple[int, ...] = ()
    rope_axes: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    pos_max_size: int = 192
    pos_base_size: int = 64
    pos_table: bool = False
    residuals: int = 0

    def __post_init__(self) -> None:
        require_depth(self.depth)
        if self.single_depth:
            require_depth(self.single_depth)
        for field in ("num_heads", "head_dim", "latent_channels", "out_channels", "patch_size", "txt_dim",
                      "pos_base_size"):  # fmt: skip
            _require_int(field, getattr(self, field), 1)
        for field in ("pooled_dim", "cond_dim", "single_depth", "pos_max_size", "residuals"):
            _require_int(field, getattr(self, field), 0)
        if self.cond_dim == 0:
            object.__setattr__(self, "cond_dim", self.width)
        if self.head_dim % 8:
            raise SpecError(
                "head_dim must be a multiple of 8: fused attention kernels need it",
                received=str(self.head_dim),
                fix="choose hidden_size and num_heads so that hidden_size / num_heads is 32, 64, 128, …",
            )
        if self.pos_max_size and self.width % 4:
            raise SpecError(
                "the width must be a multiple of 4: 2-D sinusoidal positions take a quarter each",
                received=f"num_heads * head_dim = {self.width}",
                fix="change num_heads or head_dim",
            )
        if not self.mlp_ratio > 0 or int(self.width * self.mlp_ratio) != self.width * self.mlp_ratio:
            raise SpecError(
                "mlp_ratio must be positive and give a whole hidden width",
                received=f"{self.mlp_ratio} × width {self.width}",
                fix="use 4",
            )
        if self.activation not in ("gelu", "swiglu"):
            raise SpecError("an activation is gelu or swiglu", received=repr(self.activation), fix="name one of them")
        for field in ("time_scale", "rope_theta"):
            if not getattr(self, field) > 0:
                raise SpecError(f"{field} is positive", received=repr(getattr(self, field)), fix="see ModelSpec")
        object.__setattr__(self, "rope_axes", tuple(self.rope_axes))
        self._check_positions()
        self._check_blocks()

    def _check_positions(self) -> None:
        if any(axis < 2 or axis % 2 for axis in self.rope_axes) or sum(self.rope_axes) not in (0, self.head_dim):
            raise SpecError(
                f"rope_axes are even, and their sum is head_dim, {self.head_dim}",
                received=str(list(self.rope_axes)),
                fix="FLUX.1 and Qwen-Image rotate 16, 56 and 56 of 128 channels, FLUX.2 four times 32",
            )
        if bool(self.rope_axes) == bool(self.pos_max_size):
            raise SpecError(
                "positions are either added (pos_max_size) or rotate Q and K (rope_axes)",
                received=f"pos_max_size {self.pos_max_size}, rope_axes {list(self.rope_axes)}",
                fix="set one, and the other to 0 or ()",
            )

    def _check_blocks(self) -> None:
        object.__setattr__(self, "dual_attention_blocks", tuple(sorted(set(self.dual_attention_blocks))))
        outside = [i for i in self.dual_attention_blocks if not 0 <= i < self.depth]
        if outside:
            raise SpecError(
                f"dual_attention_blocks must name blocks 0 to {self.depth - 1}",
                received=str(outside),
                fix="drop those indices, or raise the depth",
            )
        if self.single_depth and self.text_ends:
            raise SpecError(
                "single blocks read the text stream, so that it must not end before them",
                received=f"single_depth {self.single_depth} with text_ends",
                fix="set text_ends to False",
            )
        if self.still_references and (self.guidance or self.pooled_dim or self.single_depth or self.text_ends):
            raise SpecError(
                "reference tokens at timestep 0 are known of models with joint blocks and a timestep alone",
                received="still_references with guidance, a pooled vector, single blocks or text_ends",
                fix="set still_references to False",
            )
        if self.residuals > self.depth:
            raise SpecError(
                f"a ControlNet has at most one residual per joint block: 1 to {self.depth}",
                received=str(self.residuals),
                fix=f"e.g. {max(1, self.depth // 2)}",
            )

    @property
    def width(self) -> int:
        """Width of both streams' tokens."""
        return self.num_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def img_dim(self) -> int:
        """Channels of one image token at the input (C_in): a patch in channel, row, column order."""
        return self.latent_channels * self.patch_size**2

    @property
    def out_dim(self) -> int:
        """Channels of one image token at the output (C_out)."""
        return self.out_channels * self.patch_size**2

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The kind of each block, first to last."""
        last = self.depth - 1
        return tuple(
            BlockSpec(
                dual_attention=i in self.dual_attention_blocks,
                text_ends=i == last and self.text_ends,
                text_unread=i == last and not self.text_ends and self.single_depth == 0,
                residual=self.residuals > 0 and not (i == last and self.text_ends),
            )
            for i in range(self.depth)
        )

    @property
    def block_names(self) -> tuple[str, ...]:
        """How each block is called, first to last: ``blocks.0`` …, then ``single_blocks.0`` …"""
        joint = (f"blocks.{i}" for i in range(self.depth))
        return (*joint, *(f"single_blocks.{i}" for i in range(self.single_depth)))

    @property
    def attentions(self) -> int:
        """Attentions of the whole model."""
        return sum(block.attentions for block in self.blocks) + self.single_depth

    @property
    def id_axes(self) -> int:
        """Axes of a token's position ids: row and column where positions are added, RoPE's axes else."""
        return len(self.rope_axes) or 2

    @property
    def max_img_tokens(self) -> int | None:
        """Image tokens of the largest grid that has positions; None for any."""
        return self.pos_max_size**2 or None

    def residual_of(self, block: int) -> int:
        """Which of the stacked residuals a joint block takes (diffusers SD3Transformer2DModel.forward)."""
        return int(block / (self.depth / self.residuals))

    def differences(self, other: ModelSpec, *, besides: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
        """In what the checkpoints of two architectures differ: nothing where one may stand for the other.

        The name, and a ControlNet's residuals, are the export's own.

        Args:
            besides: fields that may differ too.

        Returns:
            Our value and the other's, by field.
        """
        ours, theirs = self.to_json(), other.to_json()
        free = {"name", "residuals", *besides}
        return {key: (ours[key], theirs[key]) for key in ours if key not in free and ours[key] != theirs[key]}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelSpec:
        """Read what `to_json` wrote.

        Raises:
            SpecError: a field is unknown or breaks a rule.
        """
        known = {field.name for field in dataclasses.fields(ModelSpec)}
        unknown = sorted(set(data) - known)
        missing = sorted({"name", "depth", "num_heads"} - set(data))
        if unknown or missing:
            raise SpecError(
                f"a spec has the fields {', '.join(sorted(known))}",
                received=f"unknown {unknown}, missing {missing}",
                fix="re-export the bundle with this version",
            )
        lists = {field: tuple(data.get(field, ())) for field in ("dual_attention_blocks", "rope_axes")}
        return ModelSpec(**{**data, **lists})


def require_depth(depth: object) -> None:
    """Check that a depth is a whole number from 1 to 128.

    Raises:
        SpecError: it is not.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
        raise SpecError(f"depth is a whole number from 1 to {MAX_DEPTH}", received=repr(depth), fix="e.g. --depth 24")


def _require_int(field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(
            f"{field} must be a whole number of at least {least}",
            received=repr(value),
            fix=f"set {field} to {least} or more",
        )
