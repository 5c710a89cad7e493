"""An export with LoRAs: what the bundle holds, says, and is verified against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor

MODULE = "transformer_blocks.0.attn.to_q"
FUSED = "joint_blocks_1_x_block_attn_qkv"
WEIGHTS = "weights.safetensors"


def factors(name: str, out: int, down: str, up: str) -> dict[str, Tensor]:
    return {
        f"{name}.{down}.weight": random_tensor(1, f"{name} A", (4, 64), std=0.2),
        f"{name}.{up}.weight": random_tensor(1, f"{name} B", (out, 4), std=0.2),
    }


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A LoRA as diffusers writes it, without alpha, and with a text encoder's part."""
    tensors = factors(f"transformer.{MODULE}", 64, "lora_A", "lora_B")
    save_file({**tensors, "text_encoder.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """A LoRA as kohya's scripts write it, on a fused projection."""
    tensors = factors(f"lora_unet_{FUSED}", 192, "lora_down", "lora_up")
    save_file({**tensors, f"lora_unet_{FUSED}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")
    return tmp_path / "kohya.safetensors"


def delta(path: Path) -> Tensor:
    tensors = {key: tensor.double() for key, tensor in load_file(path).items() if not key.startswith("text_encoder")}
    down = next(t for key, t in tensors.items() if "lora_A" in key or "down" in key)
    up = next(t for key, t in tensors.items() if "lora_B" in key or "up" in key)
    return up @ down


def test_a_bundle_with_two_loras(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...], style: Path, kohya: Path
) -> None:
    out = dist / "b"
    result = run(
        "export", checkpoint, "--fp16", *quick, "--lora", f"{style}:0.5", "--lora", f"{kohya}:-1", "-o", out, "--json"
    )
    assert result.status == 0, result.err

    merged, base = load_file(out / WEIGHTS), load_file(next(checkpoint.glob("*.safetensors")))
    expected = {key: tensor.double() for key, tensor in base.items()}
    expected[f"{MODULE}.weight"] += 0.5 * delta(style)
    keys = [f"transformer_blocks.1.attn.to_{name}.weight" for name in "qkv"]
    for key, rows in zip(keys, delta(kohya).chunk(3), strict=True):
        expected[key] -= 0.5 * rows  # alpha 2 of rank 4
    for key, tensor in merged.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.double(), expected[key], rtol=2**-10, atol=1e-6, msg=key)
        assert torch.equal(tensor, base[key].half()) == (key not in (f"{MODULE}.weight", *keys))

    origin = f"checkpoint {checkpoint} + LoRA {style} × 0.5 + LoRA {kohya} × -1"
    assert result.json["weights"] == origin
    weights = json.loads((out / "manifest.json").read_text())["weights"]
    assert weights["origin"] == origin and not weights["random"]
    first, second = weights["loras"]
    assert (first["file"], first["scale"], first["ranks"], first["alphas"]) == (str(style), 0.5, [4], [4.0])
    assert (first["keys"], first["ignored_text_encoder_keys"]) == ([f"{MODULE}.weight"], 1)
    assert (second["scale"], second["alphas"], second["keys"]) == (-1.0, [2.0], sorted(keys))
    assert f"lora: {style} × 0.5: 1 module, 1 tensor changed, rank 4, alpha 4\n" in result.err
    assert f"lora: {style}: 1 tensor of text encoders ignored\n" in result.err
    assert f"warning: {style} does not say alpha for 1 module: taken to be the rank\n" in result.err

    # Later, against the checkpoint: the LoRAs are merged again, and must still be the same.
    assert run("verify", out, "--checkpoint", checkpoint).status == 0
    kohya.write_bytes(style.read_bytes())
    run("verify", out, "--checkpoint", checkpoint).refused(2, str(kohya))


def test_a_bundle_is_verified_from_elsewhere(
    run: Callable[..., Any],
    checkpoint: Path,
    dist: Path,
    quick: tuple[str, ...],
    style: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(style.parent)
    assert run("export", checkpoint, *quick, "--lora", style.name, "-o", dist / "b").status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    verify = ("verify", dist / "b", "--checkpoint", checkpoint)
    assert run(*verify).status == 0
    moved = style.rename(tmp_path / "elsewhere" / "moved.safetensors")
    said = run(*verify).refused(2, "where there is none", "--lora FILE, with the SHA-256")
    assert json.loads((dist / "b" / "manifest.json").read_text())["weights"]["loras"][0]["sha256"] in said
    assert run(*verify, "--lora", moved.name).status == 0
    run(*verify, "--lora", "").refused(2, "--lora takes a FILE")


def test_random_weights_with_a_lora_are_called_random(
    run: Callable[..., Any], dist: Path, quick: tuple[str, ...], tmp_path: Path
) -> None:
    style = tmp_path / "one.safetensors"
    save_file(factors("transformer.proj_out", 64, "lora_A", "lora_B"), style)
    result = run("export", "--depth", "1", "--lora", style, *quick, "-o", dist / "b", "--dry-run", "--json")
    assert result.status == 0, result.err
    assert result.json["weights"] == f"random (seed 0) + LoRA {style} × 1"


def test_a_file_with_a_colon(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...], style: Path
) -> None:
    path = style.rename(style.with_name("v1:2.safetensors"))
    arguments = ("export", checkpoint, *quick, "-o", dist / "b", "--dry-run", "--json", "--lora")
    assert run(*arguments, path).json["weights"].endswith(f"LoRA {path} × 1")
    assert run(*arguments, f"{path}:3").json["weights"].endswith(f"LoRA {path} × 3")


def test_refusals(refuse: Callable[..., str], checkpoint: Path, style: Path, tmp_path: Path) -> None:
    refuse(2, [checkpoint, "--lora", f"{style}:x"], "SCALE is a finite number")
    refuse(2, [checkpoint, "--lora", ""], "--lora takes FILE")
    refuse(2, [checkpoint, "--lora", f"{style}:1e9"], "the scale of a LoRA")
    refuse(2, [checkpoint, "--lora", tmp_path / "nowhere.safetensors"], "no such path")
    refuse(2, ["--preset", "sd3-medium", "--lora", style], "shape [4, 64], expected [4, 1536]")
    other = tmp_path / "other.safetensors"
    save_file(factors("lora_unet_double_blocks_0_img_attn_qkv", 192, "lora_down", "lora_up"), other)
    refuse(2, [checkpoint, "--lora", style, "--lora", other], "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight")
