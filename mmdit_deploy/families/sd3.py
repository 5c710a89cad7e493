"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdit_deploy.errors import SpecError
from mmdit_deploy.families.family import (
    BLOCK,
    Family,
    Grid,
    Ids,
    Keys,
    Shapes,
    blocks_of,
    grid,
    joined,
    joint_attention,
    mlp,
    taken,
)
from mmdit_deploy.spec import ModelSpec

POSITION_TABLE = "pos_embed.pos_embed"  # in every checkpoint; a parameter only where it differs from the formula
_X, _CONTEXT = "joint_blocks.*.x_block", "joint_blocks.*.context_block"

KEYS = (
    Keys("img_embed.proj", ("pos_embed.proj",), "x_embedder.proj"),
    Keys("txt_embed.proj", ("context_embedder",), "context_embedder"),
    Keys("conditioning.time.up", ("time_text_embed.timestep_embedder.linear_1",), "t_embedder.mlp.0"),
    Keys("conditioning.time.down", ("time_text_embed.timestep_embedder.linear_2",), "t_embedder.mlp.2"),
    Keys("conditioning.pooled.up", ("time_text_embed.text_embedder.linear_1",), "y_embedder.mlp.0"),
    Keys("conditioning.pooled.down", ("time_text_embed.text_embedder.linear_2",), "y_embedder.mlp.2"),
    Keys("modulations.*.img.proj", (f"{BLOCK}.norm1.linear",), f"{_X}.adaLN_modulation.1"),
    Keys(
        "modulations.*.txt.proj",
        (f"{BLOCK}.norm1_context.linear",),
        f"{_CONTEXT}.adaLN_modulation.1",
        swapped="last block",
    ),
    Keys("final_modulation.proj", ("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped="always"),
    *joint_attention("img", f"{_X}.attn", ("ln_q", "ln_k")),
    *mlp("img", ("ff.net.0.proj", "ff.net.2"), (f"{_X}.mlp.fc1", f"{_X}.mlp.fc2")),
    Keys("blocks.*.img.qkv2.proj", joined(f"{BLOCK}.attn2", ("to_q", "to_k", "to_v")), f"{_X}.attn2.qkv"),
    Keys("blocks.*.img.qkv2.norm_q", (f"{BLOCK}.attn2.norm_q",), f"{_X}.attn2.ln_q"),
    Keys("blocks.*.img.qkv2.norm_k", (f"{BLOCK}.attn2.norm_k",), f"{_X}.attn2.ln_k"),
    Keys("blocks.*.img.attn2_out", (f"{BLOCK}.attn2.to_out.0",), f"{_X}.attn2.proj"),
    *joint_attention("txt", f"{_CONTEXT}.attn", ("ln_q", "ln_k")),
    *mlp("txt", ("ff_context.net.0.proj", "ff_context.net.2"), (f"{_CONTEXT}.mlp.fc1", f"{_CONTEXT}.mlp.fc2")),
    Keys("final.proj", ("proj_out",), "final_layer.linear"),
)
SAME = {
    "num_layers": "depth",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "in_channels": "latent_channels",
    "patch_size": "patch_size",
    "joint_attention_dim": "txt_dim",
    "pooled_projection_dim": "pooled_dim",
    "dual_attention_layers": "dual_attention_blocks",
    "pos_embed_max_size": "pos_max_size",
}


def spec_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says about the spec."""
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_projection_dim"] != width:
        raise SpecError(
            "caption_projection_dim equals num_attention_heads * attention_head_dim: both streams have one width",
            received=f"{c['caption_projection_dim']} and {width}",
            fix="repair config.json",
        )
    return taken(c, SAME) | dict(
        out_channels=c["in_channels"] if c["out_channels"] is None else c["out_channels"],
        qk_norm=c["qk_norm"] == "rms_norm",
        dual_attention_blocks=tuple(c["dual_attention_layers"]),
        pos_base_size=c["sample_size"] // c["patch_size"],
    )


def config_fields(spec: ModelSpec) -> dict[str, Any]:
    """What a spec says about the config."""
    return dict(
        caption_projection_dim=spec.width,
        out_channels=spec.out_channels,
        qk_norm="rms_norm" if spec.qk_norm else None,
        sample_size=spec.pos_base_size * spec.patch_size,
    )


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The config of tensors; heads of 64 where no norm tells their width, positions for 1024² pixels."""
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    depth = blocks_of(shapes, "transformer_blocks")
    head_dim = shapes.get("transformer_blocks.0.attn.norm_q.weight", (64,))[0]
    dual = [i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes]
    return dict(
        patch_size=patch,
        in_channels=channels,
        num_layers=depth,
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=shapes["context_embedder.weight"][1],
        caption_projection_dim=width,
        pooled_projection_dim=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        out_channels=shapes["proj_out.weight"][0] // patch**2,
        pos_embed_max_size=math.isqrt(shapes[POSITION_TABLE][1]) if POSITION_TABLE in shapes else 192,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    )


def position_ids(images: Sequence[Grid], txt_tokens: int) -> Ids:
    """Rows and columns of the image; text has no positions."""
    ((rows, cols),) = images
    return grid(rows, cols), np.zeros((txt_tokens, 2), np.float32)


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 / 3.5",
    # Each as published: stabilityai/stable-diffusion-3-medium-diffusers, -3.5-large, -3.5-large-turbo, -3.5-medium.
    presets=(
        ModelSpec("sd3-medium", depth=24, num_heads=24, qk_norm=False),
        ModelSpec("sd3.5-large", depth=38, num_heads=38),
        ModelSpec("sd3.5-large-turbo", depth=38, num_heads=38),
        ModelSpec("sd3.5-medium", depth=24, num_heads=24, dual_attention_blocks=tuple(range(13)), pos_max_size=384),
    ),
    config_class="SD3Transformer2DModel",
    config_defaults={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 18,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (),
        "qk_norm": None,
    },
    config_choices={"qk_norm": (None, "rms_norm")},
    spec_fields=spec_fields,
    same_fields=SAME,
    config_fields=config_fields,
    infer_config=infer_config,
    keys=KEYS,
    buffers={POSITION_TABLE: "pos_embed"},
    patch_convolution=True,
    position_ids=position_ids,
    controlnet=True,
)
