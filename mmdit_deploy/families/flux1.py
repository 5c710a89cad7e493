"""FLUX.1 dev, schnell and Kontext (Black Forest Labs; Kontext: arXiv:2506.15742)."""

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
    grid,
    joined,
    packed_config,
    packed_fields,
    rope_axes,
)
from mmdit_deploy.families.flux import SINGLE, embedder, infer_sizes, streams_and_head
from mmdit_deploy.spec import ModelSpec

KEYS = (
    *streams_and_head(("net.0.proj", "net.2")),
    *embedder("conditioning.time", "time_text_embed.timestep_embedder", "time_in"),
    *embedder("conditioning.guidance", "time_text_embed.guidance_embedder", "guidance_in"),
    *embedder("conditioning.pooled", "time_text_embed.text_embedder", "vector_in"),
    Keys("modulations.*.img.proj", (f"{BLOCK}.norm1.linear",), "double_blocks.*.img_mod.lin"),
    Keys("modulations.*.txt.proj", (f"{BLOCK}.norm1_context.linear",), "double_blocks.*.txt_mod.lin"),
    Keys("single_modulations.*.proj", (f"{SINGLE}.norm.linear",), "single_blocks.*.modulation.lin"),
    Keys(
        "single_blocks.*.proj",
        (*joined(f"{SINGLE}.attn", ("to_q", "to_k", "to_v")), f"{SINGLE}.proj_mlp"),
        "single_blocks.*.linear1",
    ),
    Keys("single_blocks.*.out", (f"{SINGLE}.proj_out",), "single_blocks.*.linear2"),
)
SAME = {
    **PACKED,
    "num_single_layers": "single_depth",
    "pooled_projection_dim": "pooled_dim",
    "guidance_embeds": "guidance",
}


def spec_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says about the spec."""
    return packed_fields(c, SAME)


def config_fields(spec: ModelSpec) -> dict[str, Any]:
    """What a spec says about the config."""
    return packed_config(spec, patch_size=_DEFAULTS["patch_size"])


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The config of tensors; RoPE's axes in the proportions of the published models."""
    sizes = infer_sizes(shapes)
    return sizes | dict(
        pooled_projection_dim=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        guidance_embeds="time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        axes_dims_rope=rope_axes(sizes["attention_head_dim"]),
    )


def position_ids(images: Sequence[Grid], txt_tokens: int) -> Ids:
    """(0, row, column), references (1, row, column); text is at the origin (diffusers FluxKontextPipeline)."""
    parts = [np.concatenate([np.full((r * c, 1), i > 0), grid(r, c)], 1) for i, (r, c) in enumerate(images)]
    return np.concatenate(parts).astype(np.float32), np.zeros((txt_tokens, 3), np.float32)


_DEFAULTS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}

FLUX1 = Family(
    name="flux1",
    title="FLUX.1",
    # black-forest-labs/FLUX.1-dev, FLUX.1-schnell and FLUX.1-Kontext-dev, transformer/config.json
    presets=(
        ModelSpec("flux1-dev", family="flux1", **spec_fields({**_DEFAULTS, "guidance_embeds": True})),
        ModelSpec("flux1-schnell", family="flux1", **spec_fields(_DEFAULTS)),
        ModelSpec("flux1-kontext-dev", family="flux1", **spec_fields({**_DEFAULTS, "guidance_embeds": True})),
    ),
    config_class="FluxTransformer2DModel",
    config_defaults=_DEFAULTS,
    spec_fields=spec_fields,
    same_fields=SAME,
    config_fields=config_fields,
    infer_config=infer_config,
    keys=KEYS,
    position_ids=position_ids,
    references=True,
)
