"""A checkpoint's config.json becomes a spec, or is refused by the name of the field."""

from __future__ import annotations

from typing import Any

import pytest

from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.spec import PRESETS, ModelSpec, spec_from_config

CLASS = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.30.0"}
MEDIUM = {
    **CLASS,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
LARGE = {**MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
PUBLISHED = {
    "sd3-medium": MEDIUM,
    "sd3.5-large": {**LARGE, "qk_norm": "rms_norm"},
    "sd3.5-medium": {
        **MEDIUM,
        "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
        "pos_embed_max_size": 384,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_are_the_presets(name: str) -> None:
    assert spec_from_config(PUBLISHED[name], name) == PRESETS[name]


def test_a_field_that_is_not_given_has_diffusers_default() -> None:
    spec = spec_from_config(CLASS, "m")
    assert spec == ModelSpec("m", depth=18, num_heads=18, qk_norm=False, pos_max_size=96, pos_base_size=64)


def test_the_defaults_are_those_of_the_installed_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    import inspect

    from mmdit_deploy.spec.diffusers_config import SD3_DEFAULTS

    signature = inspect.signature(diffusers.SD3Transformer2DModel.__init__)
    theirs = {n: p.default for n, p in signature.parameters.items() if n != "self"}
    assert theirs == dict(SD3_DEFAULTS)


def test_out_channels_follow_in_channels_where_null() -> None:
    assert spec_from_config({**CLASS, "in_channels": 8, "out_channels": None}, "m").out_channels == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, ["_class_name", "Flux", "SD3Transformer2DModel"]),
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
