"""`mmdit-export` where all is well: what is in the bundle, and what the command says of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.runtime import Engine

FILES = {
    "manifest.json", "model.onnx", "model.ort.onnx", "weights.safetensors", "reference.safetensors",
    "parity.json", "report.html",
}  # fmt: skip


def digests(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


def test_the_bundle_of_a_checkpoint(exported: tuple[Path, Any], checkpoint: Path) -> None:
    path, _ = exported
    assert {p.name for p in path.iterdir()} == FILES
    bundle = open_bundle(path)
    fields = bundle.manifest.fields
    assert (bundle.name, bundle.precision.name) == ("tiny-sd3", "fp16")
    assert fields["weights"] == {
        "origin": f"checkpoint {checkpoint}", "random": False, "loras": [], "file": "weights.safetensors"
    }  # fmt: skip
    assert fields["verified"] == ["ort-cpu"]
    assert fields["engines"]["ort-cpu"]["graph"] == "model.ort.onnx"
    assert sum(fields["graph"]["census"].values()) > 0
    assert {"python", "torch", "onnx"} <= set(fields["versions"])
    assert [bundle.contract.ranges[axis].max for axis in ("batch", "img_tokens", "txt_tokens")] == [2, 48, 16]
    parity = json.loads((path / "parity.json").read_text())
    assert parity["verdicts"][0]["passed"] is True
    assert str(checkpoint) in (path / "report.html").read_text(encoding="utf-8")
    assert (path / "model.onnx").stat().st_size < 10**6


def test_the_weights_are_the_checkpoints(exported: tuple[Path, Any], checkpoint: Path) -> None:
    ours = load_file(exported[0] / "weights.safetensors")
    theirs = load_file(checkpoint / "diffusion_pytorch_model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key].half()) for key in ours)


def test_json_is_one_document_on_standard_output(exported: tuple[Path, Any], checkpoint: Path) -> None:
    path, result = exported
    data = result.json
    assert data["bundle"] == str(path) and data["dry_run"] is False
    assert data["weights"] == f"checkpoint {checkpoint}"
    assert data["verdicts"][0]["passed"] is True
    assert data["parameters"] == sum(t.numel() for t in load_file(path / "weights.safetensors").values())
    assert data["weights_bytes"] == (path / "weights.safetensors").stat().st_size
    assert data["engines"] == {} and data["segments"] == {}  # of TensorRT
    assert "PASS" in result.err and "bundle written, ort-cpu verified" in result.err


def test_the_engine_runs(exported: tuple[Path, Any]) -> None:
    engine = Engine.load(exported[0])
    inputs = {
        t.name: torch.zeros(t.shape({"batch": 1, "img_tokens": 4, "txt_tokens": 1}), dtype=getattr(torch, t.dtype))
        for t in engine.contract.inputs
    }
    assert engine(inputs)["sample"].shape == (1, 4, 12)


def test_random_weights_are_called_random(
    run: Callable[..., Any],
    checkpoint_spec: Any,
    dist: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: tuple[str, ...],
) -> None:
    monkeypatch.setattr("mmdit_deploy.spec.from_depth", lambda depth: checkpoint_spec)
    result = run("export", "--depth", "2", "--seed", "11", *quick, "-o", dist / "b")
    assert result.status == 0
    assert "random (seed 11) — no checkpoint was given" in result.err
    weights = open_bundle(dist / "b").manifest.fields["weights"]
    assert weights == {
        "origin": "random (seed 11)",
        "random": True,
        "seed": 11,
        "loras": [],
        "file": "weights.safetensors",
    }
    for name in ("parity.json", "report.html"):
        assert "random (seed 11)" in (dist / "b" / name).read_text(encoding="utf-8")


def test_an_existing_bundle_is_refused_and_replaced_with_force(
    run: Callable[..., Any], folder: Any, bundle: Path, quick: tuple[str, ...]
) -> None:
    before = digests(bundle)
    run("export", folder.path, *quick, "-o", bundle).refused(2, "--force", str(bundle))
    assert digests(bundle) == before
    folder.edit(lambda t: t["proj_out.bias"].add_(1.0))
    result = run("export", folder.path, *quick, "-o", bundle, "--force", "--no-verify")
    assert result.status == 0, result.err
    after = digests(bundle)
    assert after["weights.safetensors"] != before["weights.safetensors"]
    assert set(after) == FILES - {
        "reference.safetensors",
        "parity.json",
        "report.html",
    }  # nothing of the old one
    open_bundle(bundle)


def test_force_does_not_replace_a_folder_that_is_no_bundle(
    run: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    run("export", checkpoint, "-o", mine, "--force").refused(2, "no bundle")
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_without_verification_nothing_is_called_verified(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...]
) -> None:
    result = run("export", checkpoint, *quick, "-o", dist / "b", "--no-verify", "--json")
    assert result.status == 0
    assert "NOT verified" in result.err and "PASS" not in result.err
    assert result.json["verdicts"] == []
    fields = open_bundle(dist / "b").manifest.fields
    assert fields["verified"] == []
    assert not (dist / "b" / "parity.json").exists() and not (dist / "b" / "report.html").exists()


def test_graph_only_writes_no_weights(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...]
) -> None:
    result = run("export", checkpoint, *quick, "-o", dist / "b", "--graph-only")
    assert result.status == 0 and "NOT verified" in result.out
    assert {p.name for p in (dist / "b").iterdir()} == {"manifest.json", "model.onnx", "model.ort.onnx"}
    fields = open_bundle(dist / "b").manifest.fields
    assert (fields["engines"], fields["weights"]["file"], fields["verified"]) == ({}, None, [])
    run("verify", dist / "b").refused(2, "--graph-only")
    run("bench", dist / "b").refused(2, "engine")


def test_dry_run_writes_nothing(run: Callable[..., Any], checkpoint: Path, dist: Path) -> None:
    result = run("export", checkpoint, "-o", dist / "deep" / "b", "--dry-run", "--json")
    assert result.status == 0 and "nothing was written" in result.err
    assert result.json["dry_run"] is True and result.json["disk_bytes"] > result.json["weights_bytes"]
    assert os.listdir(dist) == []


def test_the_parents_of_the_bundle_are_made(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...]
) -> None:
    result = run("export", checkpoint, *quick, "-o", dist / "a" / "b" / "c", "--no-verify")
    assert result.status == 0, result.err
    open_bundle(dist / "a" / "b" / "c")


def test_the_default_path_is_named_after_model_and_precision(
    run: Callable[..., Any], checkpoint: Path, dist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dist)
    for given in (checkpoint, checkpoint.parent):
        data = run("export", given, "--bf16", "--dry-run", "--json").json
        assert data["bundle"] == "dist/tiny-sd3-bf16"


def test_block_outputs_are_outputs_of_the_graph(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...]
) -> None:
    result = run("export", checkpoint, *quick, "-o", dist / "b", "--outputs", "blocks.1", "--outputs", "blocks.0")
    assert result.status == 0, result.err
    for name in ("model.onnx", "model.ort.onnx"):
        model = onnx.load(dist / "b" / name, load_external_data=False)
        assert [o.name for o in model.graph.output] == ["sample", "blocks.1", "blocks.0"]
    engine = Engine.load(dist / "b")
    inputs = {
        t.name: torch.ones(t.shape({"batch": 2, "img_tokens": 6, "txt_tokens": 3}), dtype=getattr(torch, t.dtype))
        for t in engine.contract.inputs
    }
    outputs = engine(inputs)
    assert outputs["blocks.0"].shape == outputs["blocks.1"].shape == (2, 6, 64)
    assert not torch.equal(outputs["blocks.0"], outputs["blocks.1"])


def test_a_run_in_another_process_writes_the_same_bytes(
    spawn: Callable[..., Any],
    exported: tuple[Path, Any],
    checkpoint: Path,
    dist: Path,
    quick: tuple[str, ...],
) -> None:
    process = spawn("export", checkpoint, "--fp16", *quick, "-o", dist / "b", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["bundle"] == str(dist / "b")  # whatever the libraries print does not get there
    first, second = digests(exported[0]), digests(dist / "b")
    for name in ("model.onnx", "model.ort.onnx", "weights.safetensors", "reference.safetensors"):
        assert first[name] == second[name], name
