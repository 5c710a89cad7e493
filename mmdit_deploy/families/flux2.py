"""FLUX.2 dev and klein (Black Forest Labs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdit_deploy.families.family import PACKED, Family, Grid, Ids, Keys, Shapes, grid, packed_config, packed_fields
from mmdit_deploy.families.flux import SINGLE, embedder, infer_sizes, streams_and_head
from mmdit_deploy.spec import ModelSpec

KEYS = (
    *streams_and_head(("linear_in", "linear_out")),
    *embedder("conditioning.time", "time_guidance_embed.timestep_embedder", "time_in"),
    *embedder("conditioning.guidance", "time_guidance_embed.guidance_embedder", "guidance_in"),
    Keys("shared_modulation.img.proj", ("double_stream_modulation_img.linear",), "double_stream_modulation_img.lin"),
    Keys("shared_modulation.txt.proj", ("double_stream_modulation_txt.linear",), "double_stream_modulation_txt.lin"),
    Keys("shared_modulation.single.proj", ("single_stream_modulation.linear",), "single_stream_modulation.lin"),
    Keys("single_blocks.*.proj", (f"{SINGLE}.attn.to_qkv_mlp_proj",), "single_blocks.*.linear1"),
    Keys("single_blocks.*.out", (f"{SINGLE}.attn.to_out",), "single_blocks.*.linear2"),
)
SAME = {
    **PACKED,
    "num_single_layers": "single_depth",
    "guidance_embeds": "guidance",
    "mlp_ratio": "mlp_ratio",
}


def spec_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says about the spec."""
    return packed_fields(c, SAME) | dict(
        pooled_dim=0,
        activation="swiglu",
        bias=False,
        shared_modulation=True,
        rope_theta=float(c["rope_theta"]),
    )


def config_fields(spec: ModelSpec) -> dict[str, Any]:
    """What a spec says about the config."""
    return packed_config(spec, patch_size=_DEFAULTS["patch_size"]) | {"rope_theta": int(spec.rope_theta)}


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """The config of tensors; RoPE's four axes share a head equally, its base is the published one."""
    sizes = infer_sizes(shapes)
    return sizes | dict(
        timestep_guidance_channels=shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        mlp_ratio=shapes["transformer_blocks.0.ff.linear_out.weight"][1] / shapes["x_embedder.weight"][0],
        axes_dims_rope=(sizes["attention_head_dim"] // 4,) * 4,
        guidance_embeds="time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    )


def position_ids(images: Sequence[Grid], txt_tokens: int) -> Ids:
    """(0, row, column, 0), references at 10, 20, … on the first axis; text (0, 0, 0, i) (diffusers Flux2Pipeline)."""
    img = np.concatenate([np.pad(grid(r, c), ((0, 0), (1, 1))) for r, c in images])
    img[:, 0] = np.repeat(10 * np.arange(len(images)), [r * c for r, c in images])
    txt = np.zeros((txt_tokens, 4), np.float32)
    txt[:, 3] = np.arange(txt_tokens)
    return img, txt


_DEFAULTS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
_KLEIN = {**_DEFAULTS, "guidance_embeds": False}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}

FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    # black-forest-labs/FLUX.2-dev, FLUX.2-klein-4B and FLUX.2-klein-9B, transformer/config.json
    presets=(
        ModelSpec("flux2-dev", family="flux2", **spec_fields(_DEFAULTS)),
        ModelSpec("flux2-klein-4b", family="flux2", **spec_fields({**_KLEIN, **_KLEIN_4B})),
        ModelSpec("flux2-klein-9b", family="flux2", **spec_fields({**_KLEIN, **_KLEIN_9B})),
    ),
    config_class="Flux2Transformer2DModel",
    config_defaults=_DEFAULTS,
    config_choices={"eps": (1e-6,), "timestep_guidance_channels": (256,)},
    spec_fields=spec_fields,
    same_fields=SAME,
    config_fields=config_fields,
    infer_config=infer_config,
    keys=KEYS,
    position_ids=position_ids,
    references=True,
)
