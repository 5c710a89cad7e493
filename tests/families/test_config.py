"""A checkpoint's config.json becomes a spec, or is refused by the name of the field."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import FAMILIES, PRESETS, Family, spec_from_config
from mmdit_deploy.spec import ModelSpec

CLASS = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.30.0"}
MEDIUM = {
    **CLASS,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
LARGE = {**MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
FLUX1 = {"_class_name": "FluxTransformer2DModel"}
FLUX2 = {"_class_name": "Flux2Transformer2DModel"}
QWEN = {"_class_name": "QwenImageTransformer2DModel"}
PUBLISHED = {
    "sd3-medium": MEDIUM,
    "sd3.5-large": {**LARGE, "qk_norm": "rms_norm"},
    "sd3.5-medium": {
        **MEDIUM,
        "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
        "pos_embed_max_size": 384,
    },
    "flux1-dev": {**FLUX1, "guidance_embeds": True, "patch_size": 1, "axes_dims_rope": [16, 56, 56]},
    "flux1-schnell": {**FLUX1, "guidance_embeds": False, "num_single_layers": 38},
    "flux2-dev": {**FLUX2, "num_attention_heads": 48, "rope_theta": 2000, "mlp_ratio": 3.0, "eps": 1e-06},
    "flux2-klein-4b": {
        **FLUX2,
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "qwen-image-edit-2511": {**QWEN, "zero_cond_t": True},
    "qwen-image": {**QWEN, "num_layers": 60, "joint_attention_dim": 3584, "out_channels": 16},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_are_the_presets(name: str) -> None:
    assert spec_from_config(PUBLISHED[name], name) == PRESETS[name]


def test_a_field_that_is_not_given_has_diffusers_default() -> None:
    spec = spec_from_config(CLASS, "m")
    assert spec == ModelSpec("m", depth=18, num_heads=18, qk_norm=False, pos_max_size=96, pos_base_size=64)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_defaults_are_those_of_the_installed_diffusers(family: Family) -> None:
    diffusers = pytest.importorskip("diffusers")
    signature = inspect.signature(getattr(diffusers, family.config_class).__init__)
    theirs = {n: p.default for n, p in signature.parameters.items() if n != "self"}
    assert theirs == dict(family.config_defaults)


def test_out_channels_follow_in_channels_where_null() -> None:
    assert spec_from_config({**CLASS, "in_channels": 8, "out_channels": None}, "m").out_channels == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, ["_class_name", "UNet", "SD3Transformer2DModel", "FLUX.2"]),
        ({"_class_name": None}, ["_class_name", "None"]),
        ({"guidance_embeds": True}, ["unknown guidance_embeds"]),
        ({"num_layers": "24"}, ["num_layers", "'24'"]),
        ({"num_layers": 0}, ["num_layers", "0"]),
        ({"num_layers": 129}, ["depth", "129"]),
        ({"patch_size": 2.0}, ["patch_size", "2.0"]),
        ({"sample_size": None}, ["sample_size", "None"]),
        ({"sample_size": 1}, ["pos_base_size", "0"]),
        ({"in_channels": True}, ["in_channels", "True"]),
        ({"out_channels": "x"}, ["out_channels", "'x'"]),
        ({"qk_norm": "layer_norm"}, ["qk_norm", "layer_norm"]),
        ({"qk_norm": ["rms_norm"]}, ["qk_norm", "rms_norm"]),
        ({"dual_attention_layers": 3}, ["dual_attention_layers", "3"]),
        ({"dual_attention_layers": ["0"]}, ["dual_attention_layers", "'0'"]),
        ({"dual_attention_layers": [24]}, ["dual_attention_blocks", "24"]),
        ({"caption_projection_dim": 1152}, ["caption_projection_dim", "1152 and 1536"]),
        ({"attention_head_dim": 60, "caption_projection_dim": 1440}, ["head_dim", "60"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_from_config({**MEDIUM, **changes}, "m")
    assert caught.value.received and caught.value.fix and caught.value.exit_status == 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**FLUX1, "axes_dims_rope": [16, 56, 57]}, ["rope_axes", "57"]),
        ({**FLUX1, "axes_dims_rope": [16, 56]}, ["rope_axes", "128"]),
        ({**FLUX1, "guidance_embeds": 1}, ["guidance_embeds", "true or false"]),
        ({**FLUX1, "num_single_layers": 0}, ["num_single_layers", "0"]),
        ({**FLUX2, "eps": 1e-5}, ["eps", "1e-06", "1e-05"]),
        ({**FLUX2, "mlp_ratio": "3"}, ["mlp_ratio", "'3'"]),
        ({**FLUX2, "timestep_guidance_channels": 128}, ["timestep_guidance_channels", "256"]),
        ({**QWEN, "zero_cond_t": None}, ["zero_cond_t", "true or false"]),
        ({**QWEN, "use_layer3d_rope": True}, ["use_layer3d_rope", "not supported"]),
        ({**QWEN, "use_additional_t_cond": True}, ["use_additional_t_cond", "not supported"]),
    ],
)
def test_refusals_of_other_families(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(config, "m")
    assert all(word in str(caught.value) for word in words), caught.value
