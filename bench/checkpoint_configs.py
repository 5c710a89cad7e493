"""What checkpoints can be made of: tiny configurations of every family, and the published ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.families import PRESETS, family_of
from mmdit_deploy.families.qwen_image import STILL_REFERENCES
from mmdit_deploy.spec import ModelSpec

_TINY_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 48,
    "out_channels": 4,
    "pos_embed_max_size": 24,
}
_TINY_FLUX1 = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 48,
    "axes_dims_rope": (4, 6, 6),
}
_TINY_FLUX2 = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
_TINY_QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The arguments of the diffusers class that make a published architecture."""
    family = family_of(spec)
    table = dataclasses.replace(spec, pos_table=True) if spec.pos_max_size else spec
    shapes = {part.key: part.shape for parameter in parameters(table) for part in parameter.parts}
    if spec.still_references:
        shapes[STILL_REFERENCES] = (0,)
    return {"_class_name": family.config_class, **family.infer_config(shapes)}


CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _TINY_SD3,
    "tiny-qknorm": {**_TINY_SD3, "qk_norm": "rms_norm"},
    "tiny-dual": {**_TINY_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "tiny-flux1": _TINY_FLUX1,
    "tiny-flux1-guidance": {**_TINY_FLUX1, "guidance_embeds": True},
    "tiny-flux2": {**_TINY_FLUX2, "guidance_embeds": False},
    "tiny-flux2-guidance": _TINY_FLUX2,
    "tiny-qwen-image-edit-2511": {**_TINY_QWEN_IMAGE, "zero_cond_t": True},
    "tiny-qwen-image": _TINY_QWEN_IMAGE,
    **{name: config_of(spec) for name, spec in PRESETS.items()},
}
