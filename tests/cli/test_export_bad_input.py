"""Whatever is wrong with a checkpoint: the right exit status, rule / received / fix, and nothing left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

KEY = "transformer_blocks.1.ff.net.0.proj.weight"


def test_no_such_path(refuse: Callable[..., str], tmp_path: Path) -> None:
    refuse(2, [tmp_path / "nowhere"], "nowhere", "no such path")


def test_a_hub_name_comes_with_the_command_that_downloads_it(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(
        2, ["stabilityai/stable-diffusion-3.5-large"],
        "hf download stabilityai/stable-diffusion-3.5-large", '--include "transformer/*"',
    )  # fmt: skip


def test_an_empty_file(refuse: Callable[..., str], folder: Any) -> None:
    folder.weights.write_bytes(b"")
    refuse(2, [folder.path], folder.weights.name)


@pytest.mark.parametrize("length", [7, 100, 5000, -1])
def test_a_truncated_file(refuse: Callable[..., str], folder: Any, length: int) -> None:
    folder.weights.write_bytes(folder.weights.read_bytes()[:length])
    refuse(2, [folder.path], folder.weights.name)


def header(weights: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file; the data stays."""
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size])
    change(document)
    text = json.dumps(document).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(("begin", "end"), [(0, 10**15), (-4, 4), (4, 0), (2**63, 2**63 + 4), (8, 12)], ids=str)
def test_a_header_that_lies_about_offsets(refuse: Callable[..., str], folder: Any, begin: int, end: int) -> None:
    header(folder.weights, lambda h: h[KEY].update(data_offsets=[begin, end]))
    refuse(2, [folder.path], folder.weights.name)


def test_a_header_that_lies_about_a_shape(refuse: Callable[..., str], folder: Any) -> None:
    header(folder.weights, lambda h: h[KEY].update(shape=[2**40, 2**40]))
    refuse(2, [folder.path], KEY)


def test_a_header_that_repeats_a_key(refuse: Callable[..., str], folder: Any) -> None:
    data = folder.weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(text)["proj_out.bias"])
    text = text[:-1] + f',"proj_out.bias":{entry}}}'.encode()
    folder.weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refuse(2, [folder.path], "proj_out.bias")


@pytest.mark.parametrize("size", [2**63, 10**12, 200_000_000])
def test_a_huge_header(refuse: Callable[..., str], folder: Any, size: int) -> None:
    data = folder.weights.read_bytes()
    folder.weights.write_bytes(size.to_bytes(8, "little") + data[8:])
    refuse(2, [folder.path], "header")


def test_keys_are_listed_by_name(refuse: Callable[..., str], folder: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["proj_out.bias"]
        tensors["lora.\x1b[2J.up"] = torch.zeros(2)
        tensors[KEY] = torch.zeros(64, 256)

    said = refuse(2, [folder.edit(change)])
    assert "1 missing: 'proj_out.bias'" in said
    assert r"1 not of this model: 'lora.\x1b[2J.up'" in said and "\x1b" not in said
    assert f"1 mis-shaped: '{KEY} [64, 256], expected [256, 64]'" in said


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "1 NaN"), (float("inf"), "1 Inf")])
def test_weights_that_are_not_finite(refuse: Callable[..., str], folder: Any, value: float, words: str) -> None:
    folder.edit(lambda t: t[KEY].view(-1)[7].fill_(value))
    refuse(2, [folder.path, "--no-verify"], KEY, words)


def test_weights_beyond_fp16(refuse: Callable[..., str], folder: Any) -> None:
    folder.edit(lambda t: t[KEY].view(-1)[7].fill_(1e5))
    refuse(2, [folder.path, "--fp16"], KEY, "100000", "--bf16 or --fp32")


def test_an_unknown_class(refuse: Callable[..., str], folder: Any) -> None:
    refuse(2, [folder.edit_config(_class_name="UNet2DConditionModel")], "UNet2DConditionModel")


def test_an_unknown_field(refuse: Callable[..., str], folder: Any) -> None:
    refuse(2, [folder.edit_config(rope_theta=10000)], "unknown rope_theta")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0), ("num_layers", "2"), ("num_layers", 10**6), ("num_layers", True),
        ("attention_head_dim", 33), ("caption_projection_dim", 128), ("qk_norm", "layer_norm"),
        ("dual_attention_layers", [7]), ("patch_size", None), ("pos_embed_max_size", -1),
    ],
)  # fmt: skip
def test_a_config_that_is_none_of_a_model(refuse: Callable[..., str], folder: Any, field: str, value: Any) -> None:
    refuse(2, [folder.edit_config(**{field: value})])


def test_a_config_that_is_not_json(refuse: Callable[..., str], folder: Any) -> None:
    (folder.path / "config.json").write_text("{")
    refuse(2, [folder.path], "config.json")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickle_files_are_not_loaded(refuse: Callable[..., str], folder: Any, tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "exploded").touch, ())

    folder.weights.unlink()
    (folder.path / name).write_bytes(pickle.dumps(Bomb()))
    said = refuse(2, [folder.path])
    assert "pickle" in said and "safe_serialization" in said
    refuse(2, [folder.path / name], "pickle")
    assert not (tmp_path / "exploded").exists()


def test_a_file_of_the_folder_that_holds_no_weights(refuse: Callable[..., str], folder: Any) -> None:
    refuse(2, [folder.path / "config.json"], f"pass its folder: {folder.path}")


def test_a_file_of_another_kind_of_model(refuse: Callable[..., str], tmp_path: Path) -> None:
    save_file({"input_blocks.0.0.weight": torch.zeros(4, 4)}, tmp_path / "sd15.safetensors")
    refuse(2, [tmp_path / "sd15.safetensors"], "a UNet", "'input_blocks.0.0.weight'")
