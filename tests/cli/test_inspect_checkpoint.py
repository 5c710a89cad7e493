"""`mmdit-inspect CHECKPOINT`: family, spec, parameters by part, dtypes, and the share of conditioning alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.original_layout import stored_parts, to_original
from mmdit_deploy.checkpoint.weights import RandomWeights, stream_parts
from mmdit_deploy.cli.inspect import main
from mmdit_deploy.families import FAMILIES
from mmdit_deploy.spec import ModelSpec

SPEC = ModelSpec(
    "tiny", depth=3, num_heads=2, head_dim=8, latent_channels=4, out_channels=4, txt_dim=24, pooled_dim=20,
    pos_max_size=8, pos_base_size=4, dual_attention_blocks=(0, 1),
)  # fmt: skip
CONFIG = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 16,
    "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": [0, 1],
    "qk_norm": "rms_norm",
}  # fmt: skip
# One head of the published width, and two blocks of each stack
TINY = {
    name: dataclasses.replace(
        family.presets[0], name="model", depth=2, num_heads=1, cond_dim=0, txt_dim=16,
        single_depth=min(2, family.presets[0].single_depth), pooled_dim=min(24, family.presets[0].pooled_dim),
    )
    for name, family in FAMILIES.items()
}  # fmt: skip


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON document, and the text for people."""
    assert main([str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == err
    return json.loads(out), err


def original(spec: ModelSpec, prefix: str = "") -> dict[str, torch.Tensor]:
    """A random model as its authors store it, in bf16."""
    source, found = RandomWeights(0), {}
    for parameter in parameters(spec):
        stored = to_original(parameter, [source.part(part).bfloat16() for part in parameter.parts])
        names = [prefix + part.key for part in stored_parts(parameter, "original")]
        found |= dict(zip(names, stored, strict=True))
    return found


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = dict(stream_parts(SPEC, RandomWeights(0), torch.bfloat16))
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    data, text = inspect(tmp_path, capsys)
    total = sum(p.numel for p in parameters(SPEC))
    assert data["kind"] == "checkpoint" and data["parameters"] == total
    assert (data["family"], data["layout"], data["notes"]) == ("sd3", "diffusers", [])
    assert data["spec"]["depth"] == 3 and data["spec"]["dual_attention_blocks"] == [0, 1]
    assert data["dtypes"] == {"bfloat16": {"tensors": len(tensors), "bytes": 2 * total}}
    assert "Stable Diffusion 3 / 3.5 (SD3Transformer2DModel), diffusers layout" in text
    # The image stream has a second attention in two of three blocks, and its stream does not end in the last.
    parts = {name: part["parameters"] for name, part in data["parts"].items()}
    assert parts["joint blocks, image"] > parts["joint blocks, text"] > 0 and "single blocks" not in parts


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_of_each_family(family: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = TINY[family]
    path = tmp_path / "model.safetensors"
    save_file(original(spec, prefix), path)
    data, text = inspect(path, capsys)
    total = sum(p.numel for p in parameters(spec))
    assert data["kind"] == "checkpoint" and data["family"] == family
    assert data["layout"] == ("diffusers" if family == "qwen-image" else "original")
    assert {**data["spec"], "rope_axes": tuple(data["spec"]["rope_axes"])} == {
        **spec.to_json(),
        "dual_attention_blocks": [],
    }
    assert f"{FAMILIES[family].title} ({FAMILIES[family].config_class}), {data['layout']} layout" in text
    assert data["parameters"] == total and data["bytes"] == 2 * total
    assert sum(part["parameters"] for part in data["parts"].values()) == total
    assert sum(part["bytes"] for part in data["parts"].values()) == 2 * total
    assert sum(part["share"] for part in data["parts"].values()) == pytest.approx(1)
    assert set(data["dtypes"]) == {"bfloat16"}
    assert ("single blocks" in data["parts"]) == (spec.single_depth > 0)


def test_the_share_of_conditioning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embedders of the conditioning and all modulations, counted from the architecture."""
    spec = TINY["flux1"]
    save_file(original(spec), tmp_path / "model.safetensors")
    data, text = inspect(tmp_path / "model.safetensors", capsys)
    width = spec.width
    assert spec.guidance and width == 128
    embedders = 2 * (256 * width + width) + (24 * width + width) + 3 * (width * width + width)
    modulations = (2 * 12 + 2 * 3 + 2) * (width * width + width)  # 6 each of image and text, 3 single, 2 last
    only = data["conditioning_only"]
    assert only["parameters"] == embedders + modulations
    assert only["share"] == pytest.approx(only["parameters"] / data["parameters"])
    assert only["bytes"] == 2 * only["parameters"]
    assert f"depend on conditioning only, and on no token: {only['parameters']:,} ({only['share']:.1%})" in text


def test_other_components_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    others = {"vae.x": torch.zeros(3), "text_encoders.evil\x1b[2J.y": torch.zeros(2).half()}
    save_file(original(TINY["flux2"], "model.diffusion_model.") | others, path)
    data, text = inspect(path, capsys)
    assert data["ignored"] == [
        {"name": "VAE", "tensors": 1, "bytes": 12},
        {"name": r"text encoder 'evil\x1b[2J'", "tensors": 1, "bytes": 4},
    ]
    assert set(data["dtypes"]) == {"bfloat16"}
    assert "ignored: VAE (1 tensors, 0.0 MB)" in text and "\x1b" not in text


def test_a_checkpoint_that_is_not_whole_is_described_as_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = original(TINY["flux1"])
    del tensors["single_blocks.0.linear2.bias"]
    save_file(tensors, path)
    data, text = inspect(path, capsys)
    assert data["kind"] == "safetensors" and len(data["tensors"]) == len(tensors)
    assert "1 missing: 'single_blocks.0.linear2.bias'" in data["problem"] and "1 missing" in text
