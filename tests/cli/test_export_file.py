"""`mmdit-export FILE.safetensors`: a checkpoint as its authors publish it, alone or in an all-in-one file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.original_layout import stored_parts, to_original
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_told_by_the_tensors(
    family: str, run: Callable[..., Any], quick: tuple[str, ...], tmp_path: Path
) -> None:
    published = FAMILIES[family].presets[0]
    spec = dataclasses.replace(
        published, name="mine", depth=2, num_heads=1, cond_dim=0, single_depth=min(1, published.single_depth)
    )
    source, path = RandomWeights(0), tmp_path / "mine.safetensors"
    tensors = {"vae.decoder.conv_in.weight": torch.zeros(4, 4)}
    for parameter in parameters(spec):
        stored = to_original(parameter, [source.part(part).half() for part in parameter.parts])
        names = [f"model.diffusion_model.{part.key}" for part in stored_parts(parameter, "original")]
        tensors |= dict(zip(names, stored, strict=True))
    save_file(tensors, path)
    result = run("export", path, "--fp16", *quick, "--dry-run", "--json")
    assert result.status == 0, result.err
    data = json.loads(result.out)
    assert data["spec"]["name"] == "mine" and data["spec"]["family"] == family
    assert data["weights"] == f"checkpoint {path}"
    assert data["parameters"] == sum(parameter.numel for parameter in parameters(spec))
    assert f"{FAMILIES[family].title}, " in result.err and "layout, by its tensors" in result.err
    assert "ignored: VAE (1 tensors, 0.0 MB)" in result.err


def test_a_preset_decides_what_the_file_does_not_tell(
    run: Callable[..., Any], quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of Qwen-Image-Edit-2511 without ComfyUI's mark, of which the recipe or the preset says what it is."""
    family = FAMILIES["qwen-image"]
    tiny = {"depth": 2, "num_heads": 1, "cond_dim": 0}
    small = {spec.name: dataclasses.replace(spec, **tiny) for spec in family.presets}
    monkeypatch.setattr("mmdit_deploy.families.PRESETS", small)
    spec, source, path = small["qwen-image-edit-2511"], RandomWeights(0), tmp_path / "mine.safetensors"
    parts = [part for parameter in parameters(spec) for part in parameter.parts]
    save_file({part.key: source.part(part).half() for part in parts}, path)
    for option, name in (("--preset", spec.name), ("--recipe", f"{spec.name}-bf16")):
        result = run("export", path, option, name, *quick, "--dry-run", "--json")
        assert result.status == 0, result.err
        assert result.json["spec"]["still_references"] is True
        assert f"taken from the preset {spec.name}: still_references is True" in result.err
    result = run("export", path, *quick, "--dry-run", "--json")
    assert result.json["spec"]["still_references"] is False and f"--preset {spec.name}" in result.err
