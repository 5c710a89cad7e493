"""A checkpoint's config.json becomes a spec, or is refused by the name of the field."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import FAMILIES, PRESETS, Family, config_of, spec_from_config
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
# transformer/config.json with every field, whether diffusers reads it today or not, as public code quotes the hub's.
# Of FLUX.2-klein-9B and Qwen-Image-Edit-2509 no whole quotation was found: they have their siblings' fields.
_SD3 = {
    **CLASS,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
_SD35_LARGE = {
    **_SD3,
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
_FLUX1 = {
    **FLUX1,
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
_FLUX2 = {
    **FLUX2,
    "_diffusers_version": "0.36.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
_KLEIN_4B = {
    **_FLUX2,
    "_diffusers_version": "0.37.0.dev0",
    "guidance_embeds": False,
    "joint_attention_dim": 7680,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
}
_QWEN = {
    **QWEN,
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
_QWEN_EDIT = {
    **{key: value for key, value in _QWEN.items() if key != "pooled_projection_dim"},
    "_diffusers_version": "0.35.0.dev0",
}
PUBLISHED = (
    ("sd3-medium", {**_SD3, "_diffusers_version": "0.29.0.dev0"}),
    ("sd3.5-large", _SD35_LARGE),
    ("sd3.5-large-turbo", {**_SD35_LARGE, "_name_or_path": "stabilityai/stable-diffusion-3.5-large"}),
    (
        "sd3.5-medium",
        {**_SD3, "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
    ),
    ("flux1-dev", _FLUX1),
    ("flux1-schnell", {**_FLUX1, "_name_or_path": "../checkpoints/flux-schnell/transformer", "guidance_embeds": False}),
    (
        "flux1-kontext-dev",
        {**_FLUX1, "_diffusers_version": "0.34.0.dev0", "axes_dims_rope": [16, 56, 56], "out_channels": None},
    ),
    ("flux2-dev", _FLUX2),  # older than guidance_embeds
    ("flux2-klein-4b", _KLEIN_4B),
    (
        "flux2-klein-9b",
        {
            **_KLEIN_4B,
            "joint_attention_dim": 12288,
            "num_attention_heads": 32,
            "num_layers": 8,
            "num_single_layers": 24,
        },
    ),
    ("qwen-image", _QWEN),
    ("qwen-image-edit", _QWEN_EDIT),
    ("qwen-image-edit", {**_QWEN, "_diffusers_version": "0.36.0.dev0"}),  # -2509, with the field or without
    ("qwen-image-edit-2511", {**_QWEN_EDIT, "_diffusers_version": "0.36.0.dev0", "zero_cond_t": True}),
    (
        "qwen-image-edit-2511",
        {**_QWEN_EDIT, "zero_cond_t": True, "use_additional_t_cond": False, "use_layer3d_rope": False},
    ),
)


@pytest.mark.parametrize(("name", "config"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_the_published_configs_are_the_presets(name: str, config: dict[str, Any]) -> None:
    assert spec_from_config(config, name) == PRESETS[name]


def test_every_preset_has_a_published_config() -> None:
    assert {name for name, _ in PUBLISHED} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_spec_gives_the_config_that_gives_the_spec(name: str) -> None:
    spec = PRESETS[name]
    family = FAMILIES[spec.family]
    config = config_of(spec)
    assert set(config) == set(family.config_defaults)
    assert spec_from_config({**config, "_class_name": family.config_class}, name) == spec


def test_a_config_of_a_spec_has_the_published_values() -> None:
    for name, published in PUBLISHED:
        config = config_of(PRESETS[name])
        for field in set(published) & set(config):
            ours, theirs = config[field], published[field]
            same = ours == tuple(theirs) if isinstance(theirs, list) else ours == theirs
            # FLUX leaves out_channels open, which means as many as in_channels
            assert same or (theirs is None and ours == config["in_channels"]), (name, field)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_is_ignored_is_not_a_field_and_has_a_reason(family: Family) -> None:
    assert not set(family.config_ignored) & set(family.config_defaults)
    assert all(family.config_ignored.values())


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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_only_fields_that_may_be_null_are_null(family: Family) -> None:
    assert set(family.config_nullable) <= set(family.config_defaults)
    for key, default in family.config_defaults.items():
        config = {"_class_name": family.config_class, key: None}
        if key in family.config_nullable or default is None:
            spec_from_config(config, "m")
        else:
            with pytest.raises(CheckpointError, match=key):
                spec_from_config(config, "m")


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
        ({**FLUX2, "pooled_projection_dim": 768}, ["unknown pooled_projection_dim"]),  # Qwen-Image's alone
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
