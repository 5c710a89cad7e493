"""Whatever is wrong with the input: the right exit status, rule / received / fix, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmdit_deploy import export
from mmdit_deploy.bundle import open_bundle

KEY = "transformer_blocks.1.ff.net.0.proj.weight"


@pytest.fixture
def refuse(run: Callable[..., Any], dist: Path, ranges: tuple[str, ...]) -> Callable[..., str]:
    """Runs an export that must be refused: ``refuse(2, arguments, words…)``; gives what it says."""

    def call(status: int, arguments: list[str | Path], *words: str) -> str:
        result = run("export", *ranges, *arguments, "-o", dist / "b")  # the last range given is the one
        said: str = result.refused(status, *words)
        assert os.listdir(dist) == []
        return said

    return call


# --- checkpoints


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


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 10**15), (-4, 4), (4, 0), (2**63, 2**63 + 4), (8, 12)], ids=str
)
def test_a_header_that_lies_about_offsets(
    refuse: Callable[..., str], folder: Any, begin: int, end: int
) -> None:
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
def test_weights_that_are_not_finite(
    refuse: Callable[..., str], folder: Any, value: float, words: str
) -> None:
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
def test_a_config_that_is_none_of_a_model(
    refuse: Callable[..., str], folder: Any, field: str, value: Any
) -> None:
    refuse(2, [folder.edit_config(**{field: value})])


def test_a_config_that_is_not_json(refuse: Callable[..., str], folder: Any) -> None:
    (folder.path / "config.json").write_text("{")
    refuse(2, [folder.path], "config.json")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickle_files_are_not_loaded(
    refuse: Callable[..., str], folder: Any, tmp_path: Path, name: str
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "exploded").touch, ())

    folder.weights.unlink()
    (folder.path / name).write_bytes(pickle.dumps(Bomb()))
    said = refuse(2, [folder.path])
    assert "pickle" in said and "safe_serialization" in said
    refuse(2, [folder.path / name], "pickle")
    assert not (tmp_path / "exploded").exists()


def test_a_single_file_is_no_checkpoint(refuse: Callable[..., str], folder: Any) -> None:
    refuse(2, [folder.weights], "folder")


# --- arguments


@pytest.mark.parametrize("depth", ["0", "-3", "x", "10000", "2.5", "", "129", "--3", "9" * 5000])
def test_a_depth_that_is_none(refuse: Callable[..., str], depth: str) -> None:
    refuse(2, [f"--depth={depth}"], "depth is a whole number from 1 to 128")


@pytest.mark.parametrize("option", ["--batch", "--img-tokens", "--txt-tokens"])
@pytest.mark.parametrize(
    "text", ["8:4:16", "4:16:8", "0:4:8", "1:2", "a:b:c", "1:2:3:4", "-1:2:3", "", "1.5"]
)
def test_a_range_that_is_none(refuse: Callable[..., str], option: str, text: str) -> None:
    refuse(
        2, ["--depth", "1", f"{option}={text}", "--img-tokens", "4:8:16"][: 5 if "img" not in option else 3]
    )


def test_more_image_tokens_than_positions(refuse: Callable[..., str]) -> None:
    refuse(2, ["--depth", "1", "--img-tokens", "1:1:100000"], "192 × 192 = 36864", "100000")


def test_an_unknown_target(refuse: Callable[..., str]) -> None:
    refuse(2, ["--depth", "1", "--target", "tpu"], "ort-cpu", "'tpu'")


@pytest.mark.parametrize("target", ["trt", "rtx:sm89", "rtx:sm86+sm89+sm120"])
def test_a_target_that_this_version_does_not_build(refuse: Callable[..., str], target: str) -> None:
    refuse(3, ["--depth", "1", "--target", target], "this version builds engines for ONNX Runtime", target)


def test_a_gpu_target_without_a_gpu(refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    refuse(3, ["--depth", "1", "--target", "ort-cuda"], "CUDAExecutionProvider", "--no-verify")


@pytest.mark.parametrize(
    "names", [["blocks.2"], ["blocks.01"], ["sample"], ["blocks.1", "blocks.1"], ["blocks.-1"]]
)
def test_an_output_that_is_none(refuse: Callable[..., str], checkpoint: Path, names: list[str]) -> None:
    options = [word for name in names for word in ("--outputs", name)]
    refuse(2, [checkpoint, *options], "blocks.0 to blocks.1, each once", names[0])
    refuse(2, [checkpoint, *options, "--dry-run"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--depth", "1", "--fp16", "--bf16"],
        ["--depth", "1", "--preset", "sd3-medium"],
        ["--depth", "1", "--dry-run", "--graph-only"],
        ["--depth", "1", "--seed", "x"],
        ["--depth", "1", "--fp8"],
        ["--depth"],
    ],
)
def test_arguments_that_exclude_each_other(run: Callable[..., Any], dist: Path, arguments: list[str]) -> None:
    result = run("export", *arguments, "-o", dist / "b")
    assert result.status == 2 and "usage: mmdit-export" in result.err and "Traceback" not in result.err
    assert os.listdir(dist) == []


def test_nothing_to_export(refuse: Callable[..., str]) -> None:
    refuse(2, [], "--depth")


def test_a_checkpoint_says_its_depth(refuse: Callable[..., str], checkpoint: Path) -> None:
    refuse(2, [checkpoint, "--depth", "2"], "--depth 2")


def test_an_unknown_preset_or_recipe(refuse: Callable[..., str]) -> None:
    refuse(2, ["--preset", "sd4"], "sd3-medium", "'sd4'")
    refuse(2, ["--recipe", "sd4-fp2"], "sd3-medium-fp16")


def test_a_checkpoint_of_another_architecture_than_the_recipes(
    refuse: Callable[..., str], checkpoint: Path
) -> None:
    refuse(2, [checkpoint, "--recipe", "sd3-medium-fp16"], "sd3-medium", "depth 2, expected 24")
    refuse(2, [checkpoint, "--preset", "sd3.5-large"], "num_heads 2, expected 38")


def test_an_error_is_a_json_document_too(run: Callable[..., Any], dist: Path) -> None:
    result = run("export", "--depth", "0", "-o", dist / "b", "--json")
    assert result.status == 2
    assert result.json["exit_status"] == 2
    assert set(result.json["error"]) == {"type", "rule", "received", "fix"}


# --- the machine


def test_onnxruntime_is_missed_by_the_name_of_its_extra(
    refuse: Callable[..., str], run: Callable[..., Any], exported: tuple[Path, Any], checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("mmdit_deploy.export.pipeline.write_safetensors", lambda *_: pytest.fail("said too late"))
    refuse(3, [checkpoint], "mmdit-deploy[cpu]")
    for command in ("verify", "bench"):
        run(command, exported[0]).refused(3, "mmdit-deploy[cpu]")


def test_graphs_and_unverified_bundles_need_no_onnxruntime(
    run: Callable[..., Any], checkpoint: Path, dist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("export", checkpoint, "--no-verify", "-o", dist / "a").status == 0
    assert run("export", checkpoint, "--graph-only", "-o", dist / "b").status == 0
    open_bundle(dist / "a")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 33 MiB: as much as is asked for, and less than may be there in the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=33m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_from_the_start(
    run: Callable[..., Any], checkpoint: Path, small_disk: Path
) -> None:
    (small_disk / "mine").write_bytes(bytes(8 * 2**20))
    run("export", checkpoint, "-o", small_disk / "b").refused(3, str(small_disk), "-o")
    assert os.listdir(small_disk) == ["mine"]


@pytest.mark.parametrize("options", [["--no-verify"], ["--graph-only"], []])
def test_a_disk_that_fills_up(
    run: Callable[..., Any], checkpoint: Path, small_disk: Path, options: list[str], ranges: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    build = export.build_graphs

    def others_write_too(*args: Any, **kwargs: Any) -> Any:
        graphs = build(*args, **kwargs)
        with open(small_disk / "theirs", "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        return graphs

    monkeypatch.setattr(export, "build_graphs", others_write_too)
    run("export", checkpoint, *options, *ranges, "-o", small_disk / "b").refused(3)
    assert os.listdir(small_disk) == ["theirs"]


def test_an_engine_out_of_tolerance_is_not_written(
    run: Callable[..., Any],
    checkpoint: Path,
    dist: Path,
    ranges: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = export.build_graphs

    def other_activation(*args: Any, **kwargs: Any) -> Any:
        graphs = build(*args, **kwargs)
        (dialect,) = graphs.lowered
        model = copy.deepcopy(graphs.lowered[dialect])
        block = next(f for f in model.functions if f.name == "MMDiTJointBlock")
        gelu = next(n for n in block.node if n.op_type == "Gelu")
        gelu.CopyFrom(onnx.helper.make_node("Relu", list(gelu.input), list(gelu.output)))
        return dataclasses.replace(graphs, lowered={dialect: model})

    monkeypatch.setattr(export, "build_graphs", other_activation)
    said = run("export", checkpoint, *ranges, "-o", dist / "b").refused(1, "blocks.0 (local)", "rel-L2")
    assert "FAIL" in said and os.listdir(dist) == []
