"""`mmdit-verify`: its verdict, its reports, and what it refuses before anything is deserialized."""

from __future__ import annotations

import errno
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from mmdit_deploy.bundle import read_manifest, write_manifest


@pytest.fixture
def broken(bundle: Path) -> Path:
    """A bundle that is whole and sealed, and computes something else."""
    path = bundle / "model.ort.onnx"
    model = onnx.load(path, load_external_data=False)
    block = next(f for f in model.functions if f.name == "MMDiTJointBlock")
    split = next(n for n in block.node if n.op_type == "Split" and n.input[0] == "img_modulation")
    split.output[0], split.output[1] = split.output[1], split.output[0]
    onnx.save(model, path)
    fields = read_manifest(bundle).fields
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, fields)
    return bundle


def test_a_good_bundle(run: Callable[..., Any], exported: tuple[Path, Any], checkpoint: Path) -> None:
    result = run("verify", exported[0])
    assert result.status == 0 and result.out.startswith("PASS")
    assert f"checkpoint {checkpoint}" in result.out
    assert "verify: blocks.1 (9 of 11)" in result.err


def test_reports(run: Callable[..., Any], exported: tuple[Path, Any], tmp_path: Path) -> None:
    junit, html = tmp_path / "new" / "junit.xml", tmp_path / "new" / "report.html"
    result = run("verify", exported[0], "--json", "--junit", junit, "--html", html, "--engine", "ort-cpu")
    assert result.status == 0
    assert result.json["passed"] is True and result.json["target"] == "ort-cpu"
    suites = ElementTree.parse(junit).getroot()
    assert suites.get("failures", "0") == "0" and int(suites.get("tests", "0")) > 0
    assert "PASS" in html.read_text(encoding="utf-8")
    properties = {p.get("name"): p.get("value") for p in suites.iter("property")}
    assert properties["machine.torch"] == result.json["machine"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in html.read_text(encoding="utf-8")


def test_a_wrong_bundle_is_status_1(run: Callable[..., Any], broken: Path, checkpoint: Path, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    result = run("verify", broken, "--checkpoint", checkpoint, "--json", "--junit", junit)
    assert result.status == 1 and "FAIL" in result.err
    assert result.json["passed"] is False
    failed = [c for c in result.json["checks"] if not c["passed"]]
    assert (failed[0]["name"], failed[0]["level"]) == ("blocks.0", "local")
    assert int(ElementTree.parse(junit).getroot().get("failures", "0")) > 0
    assert run("verify", broken).status == 1  # the recorded reference is enough to tell


def test_with_the_checkpoint_every_block_is_compared(
    run: Callable[..., Any], exported: tuple[Path, Any], checkpoint: Path
) -> None:
    data = run("verify", exported[0], "--checkpoint", checkpoint.parent, "--json").json
    assert data["passed"] and {c["name"] for c in data["checks"] if c["level"] == "local"} >= {
        "blocks.0",
        "blocks.1",
    }


def test_other_weights_of_the_same_shape_fail(run: Callable[..., Any], exported: tuple[Path, Any], folder: Any) -> None:
    folder.edit(lambda t: t["transformer_blocks.1.attn.to_out.0.weight"].mul_(1.1))
    result = run("verify", exported[0], "--checkpoint", folder.path, "--json")
    assert result.status == 1
    assert next(c for c in result.json["checks"] if not c["passed"])["name"] == "blocks.1"


def test_another_architecture_is_refused(run: Callable[..., Any], exported: tuple[Path, Any], folder: Any) -> None:
    folder.edit_config(sample_size=64)
    said = run("verify", exported[0], "--checkpoint", folder.path).refused(2, "pos_base_size 32")
    assert "expected 16" in said


def test_a_bundle_with_a_controlnets_residuals(
    run: Callable[..., Any], checkpoint: Path, dist: Path, quick: tuple[str, ...]
) -> None:
    """The checkpoint says nothing of them: they are the export's."""
    made = run("export", checkpoint, "--controlnet", "1", *quick, "-o", dist / "b")
    assert made.status == 0, made.err
    result = run("verify", dist / "b", "--checkpoint", checkpoint, "--json")
    assert result.status == 0 and result.json["passed"], result.err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--thorough"], 2, "--thorough needs the weights"),
        (["--full"], 2, "--checkpoint PATH"),
        (["--full", "--checkpoint", "no/where"], 2, "--full and --checkpoint"),
        (["--lora", "style.safetensors"], 2, "--lora style.safetensors alone"),
        (["--engine", "tpu"], 2, "'tpu'"),
        (["--engine", "ort-cuda"], 3, "--target ort-cuda"),
        (["--engine", "rtx:sm89"], 3, "--target rtx:sm89"),
        (["--engine", "rtx:sm90"], 2, "sm90"),
        (["--engine", "rtx:sm89", "--blocks-only"], 2, "rtx:sm89 is run whole"),
        (["--checkpoint", "no/where"], 2, "hf download no/where"),
    ],
)
def test_refusals(
    run: Callable[..., Any], exported: tuple[Path, Any], arguments: list[str], status: int, words: str
) -> None:
    run("verify", exported[0], *arguments).refused(status, words)


@pytest.mark.parametrize(
    ("command", "option"), [("verify", "--junit"), ("verify", "--html"), ("bench", "-o"), ("bench", "--out")]
)
def test_reports_that_cannot_be_written_are_refused_before_the_work(
    run: Callable[..., Any], exported: tuple[Path, Any], command: str, option: str, tmp_path: Path
) -> None:
    """Before the bundle is even opened."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "report", tmp_path / ("x" * 300)):
        run(command, tmp_path / "no-bundle", option, path).refused(2, "a file that can be written", str(path))


@pytest.mark.parametrize("full", ["verify --junit", "bench --out"])
def test_a_full_disk_does_not_take_the_result(
    run: Callable[..., Any], exported: tuple[Path, Any], full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmdit_deploy.report.junit.write_whole", fail)
    monkeypatch.setattr("mmdit_deploy.atomic.write_whole", fail)
    monkeypatch.setattr(torch, "compile", lambda model: fail)
    command, option = full.split()
    result = run(command, exported[0], option, tmp_path / "report", "--json")
    assert result.status == 3 and "No space left" in result.err
    assert result.json.get("passed") or result.json.get("timings")


def test_what_is_no_bundle(run: Callable[..., Any], tmp_path: Path, checkpoint: Path) -> None:
    for command in ("verify", "bench"):
        run(command, tmp_path / "nowhere").refused(2, "does not exist")
        run(command, checkpoint).refused(2, "manifest.json")
        run(command, checkpoint / "config.json").refused(2, "is a file")


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_one_changed_byte_is_refused_before_anything_is_deserialized(
    run: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("nothing may be deserialized")

    for module, name in (
        (onnxruntime, "InferenceSession"),
        (onnx, "load"),
        (onnx, "load_model"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr("mmdit_deploy.checkpoint.safetensors_file.parse_header", never)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    assert len(files) == 6
    for name in files:
        data = (bundle / name).read_bytes()
        changed = bytearray(data)
        changed[len(data) // 3] ^= 0x10
        (bundle / name).write_bytes(changed)
        run(command, bundle).refused(2, name, "SHA-256")
        (bundle / name).write_bytes(data)


def test_a_file_that_is_missing_cut_or_strange_is_refused(run: Callable[..., Any], bundle: Path) -> None:
    weights = bundle / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    run("verify", bundle).refused(2, "weights.safetensors", f"{len(data) - 1} bytes")
    weights.unlink()
    run("verify", bundle).refused(2, "no such file")
    weights.write_bytes(data)
    (bundle / "model.trt.onnx").write_bytes(b"")
    run("verify", bundle).refused(2, "not listed", "model.trt.onnx")
