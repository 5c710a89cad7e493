"""`ModelSpec`: everything that decides the architecture of an MMDiT, and nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mmdit_deploy.errors import SpecError

MAX_DEPTH = 128


@dataclass(frozen=True)
class BlockSpec:
    """The structure of one joint block. Blocks with equal specs are of one *kind* and share one traced function.

    Args:
        dual_attention: the image stream has a second attention over itself (SD3.5-Medium's first blocks).
        text_ends: the text stream ends after its attention input (the last block of SD3 and SD3.5).
    """

    dual_attention: bool = False
    text_ends: bool = False

    @property
    def img_modulations(self) -> int:
        """Modulation tensors of the image stream: (shift, scale, gate) per attention and for the MLP."""
        return 9 if self.dual_attention else 6

    @property
    def txt_modulations(self) -> int:
        """Modulation tensors of the text stream; a stream that ends needs only (scale, shift)."""
        return 2 if self.text_ends else 6

    @property
    def attentions(self) -> int:
        return 2 if self.dual_attention else 1


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of one MMDiT (Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2).

    Args:
        name: how the bundle and the report call the model.
        depth: number of joint blocks, 1 to 128.
        num_heads: attention heads.
        head_dim: width of a head; the model's width is ``num_heads * head_dim``.
        latent_channels: channels of the latent image; an image token has ``latent_channels * patch_size**2``.
        out_channels: channels of the predicted velocity.
        patch_size: side of the square patch that becomes one token.
        txt_dim: width of the text encoder's tokens.
        pooled_dim: width of the pooled text vector.
        cond_dim: width of the conditioning vector; 0 means the model's width, as in SD3.
        mlp_ratio: hidden width of the MLPs over the model's width.
        qk_norm: RMSNorm with a learned weight on every head's Q and K (SD3.5; not SD3-Medium).
        dual_attention_blocks: indices of the blocks with a second image attention (SD3.5-Medium: 0 to 12).
        pos_max_size: rows and columns of the grid that image positions are cropped from (SD3: 192).
        pos_base_size: rows and columns that the positions are scaled to (SD3: 64, 1024 px).
        pos_table: positions come from the checkpoint's own table, because it differs from the formula.

    Raises:
        SpecError: a value breaks a rule; the message says which, what was received, and the fix.
    """

    name: str
    depth: int
    num_heads: int
    head_dim: int = 64
    latent_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    txt_dim: int = 4096
    pooled_dim: int = 2048
    cond_dim: int = 0
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    dual_attention_blocks: tuple[int, ...] = ()
    pos_max_size: int = 192
    pos_base_size: int = 64
    pos_table: bool = False

    def __post_init__(self) -> None:
        require_depth(self.depth)
        for field in ("num_heads", "head_dim", "latent_channels", "out_channels", "patch_size",
                      "txt_dim", "pooled_dim", "pos_max_size", "pos_base_size"):  # fmt: skip
            _require_positive_int(field, getattr(self, field))
        if self.cond_dim == 0:
            object.__setattr__(self, "cond_dim", self.width)
        _require_positive_int("cond_dim", self.cond_dim)
        if self.head_dim % 8:
            raise SpecError(
                "head_dim must be a multiple of 8: fused attention kernels need it",
                received=str(self.head_dim),
                fix="choose hidden_size and num_heads so that hidden_size / num_heads is 32, 64, 128, …",
            )
        if self.width % 4:
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
        object.__setattr__(self, "dual_attention_blocks", tuple(sorted(set(self.dual_attention_blocks))))
        outside = [i for i in self.dual_attention_blocks if not 0 <= i < self.depth]
        if outside:
            raise SpecError(
                f"dual_attention_blocks must name blocks 0 to {self.depth - 1}",
                received=str(outside),
                fix="drop those indices, or raise the depth",
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
        return tuple(
            BlockSpec(dual_attention=i in self.dual_attention_blocks, text_ends=i == self.depth - 1)
            for i in range(self.depth)
        )

    @property
    def max_img_tokens(self) -> int:
        """Image tokens of the largest grid that has positions."""
        return self.pos_max_size**2

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
        return ModelSpec(**{**data, "dual_attention_blocks": tuple(data.get("dual_attention_blocks", ()))})


def require_depth(depth: object) -> None:
    """Check that a depth is a whole number from 1 to 128.

    Raises:
        SpecError: it is not.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
        raise SpecError(f"depth is a whole number from 1 to {MAX_DEPTH}", received=repr(depth), fix="e.g. --depth 24")


def _require_positive_int(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(
            f"{field} must be a whole number of at least 1",
            received=repr(value),
            fix=f"set {field} to 1 or more",
        )
