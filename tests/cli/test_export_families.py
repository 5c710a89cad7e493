"""`mmdit-export` of the other families by preset, and with a ControlNet's residuals."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.families import preset
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec


@pytest.mark.usefixtures("room_for_large_models")
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("flux1-dev", "19 joint, 38 single"), ("qwen-image", "60 joint, 0 single"), ("flux2-dev", "8 joint, 48 single")],
)
def test_a_dry_run_says_what_a_preset_needs(
    run: Callable[..., Any], dist: Path, monkeypatch: pytest.MonkeyPatch, name: str, blocks: str
) -> None:
    monkeypatch.chdir(dist)
    result = run("export", "--preset", name, "--bf16", "--target", "ort-cpu", "--dry-run", "--json")
    assert result.status == 0, result.err
    spec = ModelSpec.from_json(result.json["spec"])
    assert spec == preset(name) and f"{spec.depth} joint, {spec.single_depth} single" == blocks
    assert result.json["bundle"] == f"dist/{name}-bf16"
    assert f"{name} bf16, weights random (seed 0): {result.json['parameters'] / 1e9:.3f} B parameters" in result.err
    assert os.listdir(dist) == []


def test_the_graph_of_a_preset_alone(run: Callable[..., Any], dist: Path) -> None:
    """At real size: 32 billion parameters, of which none is made."""
    out = dist / "b"
    result = run("export", "--preset", "flux2-dev", "--graph-only", "--target", "ort-cpu", "-o", out)
    assert result.status == 0, result.err
    assert {p.name for p in out.iterdir()} == {"manifest.json", "model.onnx", "model.ort.onnx"}
    assert (out / "model.onnx").stat().st_size < 300_000
    fields = open_bundle(out).manifest.fields
    assert {kind for kind in fields["graph"]["kinds"] if kind.endswith("Block")} == {
        "MMDiTJointBlock", "MMDiTSingleBlock"
    }  # fmt: skip
    assert fields["graph"]["census"]["Attention"] == 56 and fields["weights"]["file"] is None
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert [node.name for node in graph.node] == [call.path for call in calls(preset("flux2-dev"))]


def test_the_residuals_of_a_controlnet_are_an_export_of_their_own(
    run: Callable[..., Any], checkpoint: Path, dist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dist)
    for residuals in (1, 2):
        data = run("export", checkpoint, "--controlnet", str(residuals), "--dry-run", "--json").json
        assert data["bundle"] == "dist/tiny-sd3-controlnet-fp16"
        assert (data["spec"]["name"], data["spec"]["residuals"]) == ("tiny-sd3-controlnet", residuals)


@pytest.mark.parametrize("name", ["flux1-dev", "flux2-klein-4b", "qwen-image"])
def test_models_that_are_exported_without_residuals(refuse: Callable[..., str], name: str) -> None:
    refuse(2, ["--preset", name, "--controlnet", "4"], "inputs of Stable Diffusion 3 / 3.5", name, "export it without")
