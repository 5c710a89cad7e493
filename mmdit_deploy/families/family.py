"""What a family of models is, as data: its presets, its config, its keys, and how its tokens are numbered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmdit_deploy.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, by diffusers key
Grid = tuple[int, int]  # rows and columns of an image, in tokens
Ids = tuple[np.ndarray, np.ndarray]  # of image and text tokens: [img_tokens, axes], [txt_tokens, axes], fp32


@dataclass(frozen=True)
class Keys:
    """One module of ours, and what checkpoints call it. ``*`` is the block's index.

    Args:
        path: in `mmdit_deploy.model.MMDiT`, e.g. ``blocks.*.img.qkv.proj``.
        diffusers: the modules of diffusers' class that it joins along the first axis, in order. All but the last have
            as many rows as the model is wide.
        original: the module of the authors' own layout, which is joined already; None where that layout is diffusers'.
        scale: the original calls the weight ``scale`` (Black Forest Labs' norms).
        swapped: where the original stores shift before scale, and diffusers and we scale before shift.
    """

    path: str
    diffusers: tuple[str, ...]
    original: str | None = None
    scale: bool = False
    swapped: Literal["never", "always", "last block"] = "never"

    def rows(self, total: int, width: int) -> tuple[int, ...]:
        """Rows of each diffusers module, of ``total`` in all, in a model of that width."""
        first = (width,) * (len(self.diffusers) - 1)
        return *first, total - sum(first)


@dataclass(frozen=True)
class Family:
    """A family of checkpoints that share keys and config.

    Args:
        name: in `ModelSpec.family`.
        title: for people.
        presets: architectures by name.
        config_class: ``_class_name`` of its diffusers config.
        config_defaults: every field of the class's constructor, with its default.
        config_choices: the values that a field may have, where we know only some.
        config_nullable: fields that may be null though their default is not: diffusers' classes take as many
            out_channels as in_channels then.
        config_ignored: fields of published configs that the class does not read, and why.
        spec_fields: what a config with all fields says about the spec.
        same_fields: fields of the config whose value a field of the spec has, by the config's name for it.
        config_fields: what a spec says about those other fields of the config that are not always as the default.
        infer_config: what the tensors say about the config: fields that they do not decide are as published.
        keys: every module that the family's models may have.
        undecided: fields of the spec that tensors do not tell, but a buffer or config.json; what is taken, in words.
        buffers: keys that its checkpoints hold besides parameters; diffusers' key to the original's.
        patch_convolution: the image projection is stored as a convolution over the patch.
        position_ids: ids of the tokens of images (the one that is made, then references) and text.
        references: the model takes reference images, appended to the image tokens.
        controlnet: the model takes a ControlNet's residuals.
    """

    name: str
    title: str
    presets: tuple[ModelSpec, ...]
    config_class: str
    config_defaults: Mapping[str, Any]
    spec_fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    same_fields: Mapping[str, str]
    config_fields: Callable[[ModelSpec], dict[str, Any]]
    infer_config: Callable[[Shapes], dict[str, Any]]
    keys: tuple[Keys, ...]
    position_ids: Callable[[Sequence[Grid], int], Ids]
    buffers: Mapping[str, str] = field(default_factory=dict)
    patch_convolution: bool = False
    undecided: Mapping[str, str] = field(default_factory=dict)
    config_choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    config_nullable: tuple[str, ...] = ("out_channels",)
    config_ignored: Mapping[str, str] = field(default_factory=dict)
    references: bool = False
    controlnet: bool = False


def grid(rows: int, cols: int) -> np.ndarray:
    """Rows and columns of a row-major grid: [rows·cols, 2] fp32, 0-based."""
    return np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


def blocks_of(shapes: Shapes, stack: str) -> int:
    """How many blocks ``<stack>.<index>.…`` there are."""
    indices = {int(key.split(".")[1]) for key in shapes if key.startswith(f"{stack}.") and key.split(".")[1].isdigit()}
    return max(indices, default=-1) + 1


BLOCK = "transformer_blocks.*"  # a joint block in all of diffusers' classes
_ATTENTION = {  # projections, norms and output of each stream's part in diffusers' joint attention
    "img": (("to_q", "to_k", "to_v"), "norm_", "to_out.0"),
    "txt": (("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out"),
}


def joint_attention(
    stream: Literal["img", "txt"],
    original: str | None = None,
    norms: tuple[str, str] = ("", ""),
    *,
    scale: bool = False,
) -> tuple[Keys, ...]:
    """The modules of one stream in the joint attention, which diffusers calls alike in all families.

    Args:
        original: the module that holds ``qkv`` and ``proj`` in the authors' own layout.
        norms: of Q and K, in that module.
        scale: as in `Keys`, of the norms.
    """
    projections, norm, out = _ATTENTION[stream]

    def stored(name: str) -> str | None:
        return original and f"{original}.{name}"

    path = f"blocks.*.{stream}"
    return (
        Keys(f"{path}.qkv.proj", joined(f"{BLOCK}.attn", projections), stored("qkv")),
        Keys(f"{path}.qkv.norm_q", (f"{BLOCK}.attn.{norm}q",), stored(norms[0]), scale=scale),
        Keys(f"{path}.qkv.norm_k", (f"{BLOCK}.attn.{norm}k",), stored(norms[1]), scale=scale),
        Keys(f"{path}.attn_out", (f"{BLOCK}.attn.{out}",), stored("proj")),
    )


def mlp(
    stream: Literal["img", "txt"], diffusers: tuple[str, str], original: tuple[str, str] | None = None
) -> tuple[Keys, Keys]:
    """The two layers of one stream's MLP in a joint block."""
    up, down = original or (None, None)
    path = f"blocks.*.{stream}.mlp"
    return (
        Keys(f"{path}.up", (f"{BLOCK}.{diffusers[0]}",), up),
        Keys(f"{path}.down", (f"{BLOCK}.{diffusers[1]}",), down),
    )


def joined(stream: str, projections: Sequence[str]) -> tuple[str, ...]:
    """Names of projections that are joined: ``joined("a.attn", ("to_q", "to_k"))``."""
    return tuple(f"{stream}.{name}" for name in projections)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """An eighth of a head for the image's index, the rest in halves for rows and columns: 16, 56, 56 of 128.

    Channels turn in pairs, so that of small heads the first axis takes more: a multiple of 4.
    """
    first = max(4, head_dim // 32 * 4)
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def taken(c: Mapping[str, Any], same: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the spec that are fields of the config: ``same`` as in `Family.same_fields`."""
    return {ours: c[theirs] for theirs, ours in same.items()}


PACKED = {  # same fields, in families that take packed latents and rotate positions
    "num_layers": "depth",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "in_channels": "latent_channels",
    "joint_attention_dim": "txt_dim",
    "axes_dims_rope": "rope_axes",
}


def packed_fields(c: Mapping[str, Any], same: Mapping[str, str]) -> dict[str, Any]:
    """What a config says about the spec in families that take packed latents, rotate positions and time 0 to 1."""
    return taken(c, same) | dict(
        out_channels=c["patch_size"] ** 2 * (c["out_channels"] or c["in_channels"]),
        patch_size=1,  # latents are packed before the model
        rope_axes=tuple(c["axes_dims_rope"]),
        time_scale=1000.0,
        text_ends=False,
        fp16_clip=True,
        pos_max_size=0,
    )


def packed_config(spec: ModelSpec, patch_size: int) -> dict[str, Any]:
    """What a spec says about the config there. It does not tell the patch size: it is as published, where it can be."""
    patch_size = patch_size if spec.out_channels % patch_size**2 == 0 else 1
    return {"patch_size": patch_size, "out_channels": spec.out_channels // patch_size**2}
