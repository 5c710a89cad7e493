"""A tiny model of each family, with every kind of call that it has."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmdit_deploy.spec import ModelSpec

# Widths of their own wherever the architecture has one, so that no two axes can be confused.
TINY = ModelSpec(
    "tiny",
    depth=2,
    num_heads=2,
    head_dim=32,
    latent_channels=4,
    out_channels=3,
    txt_dim=24,
    pooled_dim=20,
    cond_dim=40,
    pos_max_size=72,
    pos_base_size=16,
)
_OTHERS: dict[str, Any] = {
    "num_heads": 2,
    "head_dim": 32,
    "latent_channels": 12,
    "out_channels": 10,
    "patch_size": 1,
    "txt_dim": 24,
    "cond_dim": 40,
    "time_scale": 1000.0,
    "text_ends": False,
    "fp16_clip": True,
    "pos_max_size": 0,
}
_QWEN_IMAGE: dict[str, Any] = {
    "family": "qwen-image",
    "pooled_dim": 0,
    "txt_norm": True,
    "txt_mask": True,
    "rope_axes": (4, 14, 14),
    **_OTHERS,
}
# Each with every kind of call that its family has. Cut in three, FLUX.1 is cut among joint and among single blocks.
TINY_FAMILIES = {
    "flux1": ModelSpec(
        "tiny-flux1",
        family="flux1",
        depth=2,
        single_depth=4,
        pooled_dim=20,
        guidance=True,
        rope_axes=(4, 14, 14),
        **_OTHERS,
    ),
    "flux2": ModelSpec(
        "tiny-flux2",
        family="flux2",
        depth=2,
        single_depth=3,
        pooled_dim=0,
        guidance=True,
        mlp_ratio=3.0,
        activation="swiglu",
        bias=False,
        shared_modulation=True,
        rope_axes=(8, 8, 8, 8),
        rope_theta=2000.0,
        **_OTHERS,
    ),
    "qwen-image": ModelSpec("tiny-qwen-image", depth=2, **_QWEN_IMAGE),
    "qwen-image-edit-2511": ModelSpec("tiny-qwen-image-edit-2511", depth=2, still_references=True, **_QWEN_IMAGE),
    "sd3-controlnet": dataclasses.replace(TINY, name="tiny-controlnet", depth=4, residuals=2),
}
