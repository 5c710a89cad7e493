"""Qwen-Image and Qwen-Image-Edit (Wu et al. 2025, arXiv:2508.02324)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdit_deploy.families.family import (
    BLOCK,
    PACKED,
    Family,
    Grid,
    Ids,
    Keys,
    Shapes,
    blocks_of,
    grid,
    joint_attention,
    mlp,
    packed_config,
    packed_fields,
    rope_axes,
)
from mmdit_deploy.spec import ModelSpec

STILL_REFERENCES = "__index_timestep_zero__"  # an empty tensor in ComfyUI's files of Qwen-Image-Edit-2511

# The authors' own layout is diffusers'.
KEYS = (
    Keys("img_embed.proj", ("img_in",)),
    Keys("txt_embed.norm", ("txt_norm",)),
    Keys("txt_embed.proj", ("txt_in",)),
    Keys("conditioning.time.up", ("time_text_embed.timestep_embedder.linear_1",)),
    Keys("conditioning.time.down", ("time_text_embed.timestep_embedder.linear_2",)),
    Keys("modulations.*.img.proj", (f"{BLOCK}.img_mod.1",)),
    Keys("modulations.*.txt.proj", (f"{BLOCK}.txt_mod.1",)),
    Keys("final_modulation.proj", ("norm_out.linear",)),
    *joint_attention("img"),
    *mlp("img", ("img_mlp.net.0.proj", "img_mlp.net.2")),
    *joint_attention("txt"),
    *mlp("txt", ("txt_mlp.net.0.proj", "txt_mlp.net.2")),
    Keys("final.proj", ("proj_out",)),
)
SAME = {**PACKED, "zero_cond_t": "still_references"}


def spec_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says about the spec."""
    return packed_fields(c, SAME) | dict(pooled_dim=0, txt_norm=True, txt_mask=True)


def config_fields(spec: ModelSpec) -> dict[str, Any]:
    """What a spec says about the config."""
    return packed_config(spec, patch_size=_DEFAULTS["patch_size"])


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The config of tensors; RoPE's axes in the proportions of the published models."""
    width, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return dict(
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // 4,
        num_layers=blocks_of(shapes, "transformer_blocks"),
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=shapes["txt_in.weight"][1],
        axes_dims_rope=rope_axes(head_dim),
        zero_cond_t=STILL_REFERENCES in shapes,
    )


def position_ids(images: Sequence[Grid], txt_tokens: int) -> Ids:
    """(index, row, column) from each image's centre; text on the diagonal, beyond the largest image.

    diffusers QwenEmbedRope, with ``scale_rope``: rows run from -⌈rows/2⌉.
    """
    parts = []
    for index, (rows, cols) in enumerate(images):
        centred = grid(rows, cols) - np.array([rows - rows // 2, cols - cols // 2], np.float32)
        parts.append(np.concatenate([np.full((rows * cols, 1), index), centred], 1))
    start = max(max(rows // 2, cols // 2) for rows, cols in images)
    txt = np.repeat(np.arange(start, start + txt_tokens, dtype=np.float32)[:, None], 3, 1)
    return np.concatenate(parts).astype(np.float32), txt


_DEFAULTS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}

QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    # Qwen/Qwen-Image, Qwen-Image-Edit with -2509, and Qwen-Image-Edit-2511, transformer/config.json
    presets=(
        ModelSpec("qwen-image", family="qwen-image", **spec_fields(_DEFAULTS)),
        ModelSpec("qwen-image-edit", family="qwen-image", **spec_fields(_DEFAULTS)),
        ModelSpec("qwen-image-edit-2511", family="qwen-image", **spec_fields({**_DEFAULTS, "zero_cond_t": True})),
    ),
    config_class="QwenImageTransformer2DModel",
    config_defaults=_DEFAULTS,
    config_choices={
        "guidance_embeds": (False,),
        "use_additional_t_cond": (False,),
        "use_layer3d_rope": (False,),
    },
    config_ignored={"pooled_projection_dim": "Qwen-Image's config.json has it; diffusers 0.35 dropped it, unused"},
    spec_fields=spec_fields,
    same_fields=SAME,
    config_fields=config_fields,
    infer_config=infer_config,
    keys=KEYS,
    buffers={STILL_REFERENCES: STILL_REFERENCES},
    undecided={
        "still_references": "reference images are modulated as in Qwen-Image-Edit and -2509; of -2511, add --preset "
        "qwen-image-edit-2511, or pass the diffusers folder"
    },
    position_ids=position_ids,
    references=True,
)
