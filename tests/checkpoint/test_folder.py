"""Every layout that people have opens; every broken one is refused with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdit_deploy.checkpoint import open_checkpoint
from mmdit_deploy.errors import CheckpointError

NAME = "diffusion_pytorch_model"
CONFIG = {"_class_name": "SD3Transformer2DModel", "num_layers": 2}
SHARDS = [f"{NAME}-0000{n}-of-00002.safetensors" for n in (1, 2)]


def tensors(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.full((2, 3), float(ord(key[0])), dtype=torch.float16) for key in keys}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json alone."""
    path = tmp_path / "transformer"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write_index(folder: Path, weight_map: object, name: str = f"{NAME}.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(folder: Path) -> Path:
    save_file(tensors("a", "b"), folder / SHARDS[0])
    save_file(tensors("c"), folder / SHARDS[1])
    write_index(folder, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    return folder


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.fix and caught.value.received
    return str(caught.value)


def test_single_file(folder: Path) -> None:
    save_file(tensors("a", "b"), folder / f"{NAME}.safetensors")
    with open_checkpoint(str(folder)) as checkpoint:
        assert (checkpoint.path, checkpoint.config) == (folder, CONFIG)
        assert checkpoint.total_bytes == 24 and checkpoint.dtypes == {torch.float16: 2}
        assert set(checkpoint.tensors) == {"a", "b"}
        assert torch.equal(checkpoint.read("b"), tensors("b")["b"])
        with pytest.raises(CheckpointError, match="'nothing'"):
            checkpoint.read("nothing")


def test_shards_are_one_table(sharded: Path) -> None:
    with open_checkpoint(sharded) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        assert [path.name for path in checkpoint.files] == SHARDS
        for key, expected in tensors("a", "b", "c").items():
            assert torch.equal(checkpoint.read(key), expected)


@pytest.mark.parametrize("with_model_index", [True, False])
def test_pipeline_folder(sharded: Path, with_model_index: bool) -> None:
    if with_model_index:
        (sharded.parent / "model_index.json").write_text("{}")
    assert open_checkpoint(sharded.parent).path == sharded


def test_hub_cache_of_symbolic_links(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sharded.iterdir()):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c"}


def test_the_only_variant_is_taken(folder: Path) -> None:
    save_file(tensors("a"), folder / f"{NAME}.fp16.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"a"}


@pytest.mark.parametrize("index", ["safetensors.index.fp16.json", "fp16.safetensors.index.json"])
def test_a_sharded_variant(sharded: Path, index: str) -> None:
    (sharded / f"{NAME}.safetensors.index.json").rename(sharded / f"{NAME}.{index}")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b", "c"}


def test_the_plain_file_wins_over_variants(folder: Path) -> None:
    for variant in ("", ".fp16", ".bf16"):
        save_file(tensors("p" + variant), folder / f"{NAME}{variant}.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"p"}
    (folder / f"{NAME}.safetensors").unlink()
    message = refusal(folder)
    assert f"{NAME}.fp16.safetensors" in message and f"{NAME}.bf16.safetensors" in message


def test_both_single_and_sharded_is_ambiguous(sharded: Path) -> None:
    save_file(tensors("a"), sharded / f"{NAME}.safetensors")
    assert "both:" in refusal(sharded)


def test_no_such_path(tmp_path: Path) -> None:
    assert "no such path" in refusal(tmp_path / "nowhere")
    assert "hf download" not in refusal("./some/path/to/nowhere")
    assert "hf download" not in refusal("folder/model.safetensors")
    for name in ("stabilityai/sd3-medium", "https://huggingface.co/stabilityai/sd3-medium"):
        command = 'hf download stabilityai/sd3-medium --include "transformer/*" --local-dir sd3-medium'
        assert command in refusal(name)


def test_configs(folder: Path) -> None:
    save_file(tensors("a"), folder / f"{NAME}.safetensors")
    config = folder / "config.json"
    for text, fragment in [
        ("{", "not JSON"),
        ("[]", "a JSON list"),
        ("{}", "_class_name"),
        ('{"_class_name": 3}', "_class_name 3"),
        ('{"_class_name": "A", "_class_name": "B"}', "repeated key '_class_name'"),
    ]:
        config.write_text(text)
        message = refusal(folder)
        assert "config.json" in message and fragment in message
    config.unlink()
    assert "must hold config.json" in refusal(folder)


def test_pipeline_without_transformer(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert "sub-folders: 'unet'" in refusal(tmp_path)


def test_folder_without_weights(folder: Path) -> None:
    assert f"{NAME}.safetensors" in refusal(folder)
    save_file(tensors("a"), folder / "model.safetensors")
    assert "'model.safetensors'" in refusal(folder)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / f"{NAME}.safetensors.index.json").unlink()
    assert ".index.json" in refusal(sharded)


def test_missing_shards_are_listed(sharded: Path) -> None:
    for name in SHARDS:
        (sharded / name).unlink()
    message = refusal(sharded)
    assert "2 missing" in message and all(name in message for name in SHARDS)


@pytest.mark.parametrize(
    "target",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "x.bin",
    ],
)
def test_index_pointing_elsewhere(sharded: Path, target: str) -> None:
    write_index(sharded, {"a": target})
    assert "its own folder" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": None}])
def test_broken_weight_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert "weight_map" in refusal(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]})
    assert "lacks 'd'" in refusal(sharded)
    write_index(sharded, {"a": SHARDS[0], "c": SHARDS[1]})
    assert "holds 'b'" in refusal(sharded)
    save_file(tensors("c", "a"), sharded / SHARDS[1])
    message = refusal(sharded)
    assert "'a' lies in" in message and all(name in message for name in SHARDS)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-5])
    message = refusal(sharded)
    assert SHARDS[1] in message and "5 bytes are missing" in message


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_with_the_reason(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x02")
    shutil.copy(path, folder / f"{NAME}{suffix}")
    for where in (path, folder):
        message = refusal(where)
        assert "CVE-2025-32434" in message and "executes code" in message and "safe_serialization=True" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.sft", f"{NAME}.safetensors"])
def test_one_file_has_no_config(folder: Path, name: str) -> None:
    save_file(tensors("a"), folder / name)
    with open_checkpoint(folder / name) as checkpoint:
        assert (checkpoint.path, checkpoint.config, checkpoint.files) == (folder / name, None, (folder / name,))
        assert torch.equal(checkpoint.read("a"), tensors("a")["a"])


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("model.gguf", "model.q4", "model.bin", "model"):
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
        assert "GGUF files are not read: their weights come quantized" in refusal(tmp_path / name)
        (folder / name).write_bytes((tmp_path / name).read_bytes())
        assert "GGUF files are not read" in refusal(folder)
        (folder / name).unlink()
    (tmp_path / "model.safetensors").write_bytes(b"GGUF" + b"\0" * 60)
    assert "a GGUF file under another name" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "empty.gguf").touch()
    assert "GGUF files are not read" in refusal(tmp_path / "empty.gguf")
    assert f"pass its folder: {folder}" in refusal(folder / "config.json")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "or a .safetensors file" in refusal(tmp_path / "model.onnx")


def test_a_folder_around_one_file(tmp_path: Path) -> None:
    """As a hub repository of an original file alone."""
    save_file(tensors("a"), tmp_path / "flux1-dev.safetensors")
    assert f"pass the file itself: {tmp_path / 'flux1-dev.safetensors'}" in refusal(tmp_path)
