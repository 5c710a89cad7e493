"""What the families say of themselves: sizes as published, ids as diffusers makes them, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.errors import SpecError, UsageError
from mmdit_deploy.families import FAMILIES, PRESETS, family_of, position_ids, preset, with_residuals
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec

# Billions of parameters, as published or as diffusers' class counts them.
SIZES = {
    "sd3-medium": 2.028,
    "sd3.5-medium": 2.243,
    "sd3.5-large": 8.057,
    "sd3.5-large-turbo": 8.057,
    "flux1-dev": 11.901,
    "flux1-schnell": 11.891,
    "flux1-kontext-dev": 11.901,
    "flux2-dev": 32.223,
    "flux2-klein-4b": 3.876,
    "flux2-klein-9b": 9.079,
    "qwen-image": 20.430,
    "qwen-image-edit": 20.430,
    "qwen-image-edit-2511": 20.430,
}
# Kinds of blocks that are traced, however deep the model is.
BLOCK_KINDS = {
    "sd3-medium": {"MMDiTJointBlock", "MMDiTLastJointBlock"},
    "sd3.5-medium": {"MMDiTDualJointBlock", "MMDiTJointBlock", "MMDiTLastJointBlock"},
    "flux1-dev": {"MMDiTJointBlock", "MMDiTSingleBlock"},
    "flux2-dev": {"MMDiTJointBlock", "MMDiTSingleBlock"},
    "qwen-image": {"MMDiTJointBlock", "MMDiTLastJointBlock"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(p.numel for p in parameters(preset(name))) / 1e9 == pytest.approx(SIZES[name], abs=5e-4)


@pytest.mark.parametrize("name", BLOCK_KINDS)
def test_block_kinds_are_few(name: str) -> None:
    kinds = {call.kind.function for call in calls(preset(name)) if call.kind.function.endswith("Block")}
    assert kinds == BLOCK_KINDS[name]


def test_a_family_has_one_module_per_key() -> None:
    for family in FAMILIES.values():
        paths = [keys.path for keys in family.keys]
        stored = [name for keys in family.keys for name in keys.diffusers]
        assert len(set(paths)) == len(paths) and len(set(stored)) == len(stored)


def test_an_unknown_family() -> None:
    with pytest.raises(SpecError, match="sd3, flux1, flux2, qwen-image"):
        family_of(ModelSpec("m", depth=1, num_heads=1, family="pixart"))


def test_kontexts_ids_are_those_of_its_pipeline() -> None:
    diffusers = pytest.importorskip("diffusers")
    make: Any = diffusers.FluxKontextPipeline._prepare_latent_image_ids
    made = make(1, 3, 5, "cpu", torch.float32)
    reference = make(1, 2, 4, "cpu", torch.float32)
    reference[..., 0] = 1
    img, txt = position_ids(preset("flux1-kontext-dev"), [(3, 5), (2, 4)], 7)
    np.testing.assert_array_equal(img, torch.cat([made, reference]).numpy())
    assert txt.shape == (7, 3) and not txt.any()


def test_flux2s_ids_are_those_of_its_pipeline() -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline: Any = diffusers.Flux2Pipeline
    made = pipeline._prepare_latent_ids(torch.zeros(1, 8, 3, 5))[0]
    references = pipeline._prepare_image_ids([torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 6, 1)])[0]
    text = pipeline._prepare_text_ids(torch.zeros(1, 7, 16))[0]
    img, txt = position_ids(preset("flux2-dev"), [(3, 5), (2, 4), (6, 1)], 7)
    np.testing.assert_array_equal(img, torch.cat([made, references]).numpy())
    np.testing.assert_array_equal(txt, text.numpy())


@pytest.mark.parametrize("images", [[], [(4, 4), (2, 2)]])
def test_models_without_references_take_one_image(images: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match="takes one image"):
        position_ids(preset("sd3-medium"), images, 3)
    with pytest.raises(UsageError, match="its references"):
        position_ids(preset("flux2-dev"), [], 3)


def test_residuals_of_a_controlnet() -> None:
    spec = with_residuals(preset("sd3.5-large"), 19)
    assert (spec.name, spec.residuals) == ("sd3.5-large-controlnet", 19)
    assert [spec.residual_of(i) for i in (0, 1, 2, 37)] == [0, 0, 1, 18]
    with pytest.raises(UsageError, match="FLUX"):
        with_residuals(preset("flux1-dev"), 1)
    for count in (0, 39):
        with pytest.raises(UsageError, match="1 to 38"):
            with_residuals(preset("sd3.5-large"), count)
