"""`mmdit-inspect` says what is in each kind of thing, and what is wrong with the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from mmdit_deploy.bundle import write_manifest
from mmdit_deploy.cli.inspect import main
from mmdit_deploy.contract import Contract
from mmdit_deploy.spec import ModelSpec, precision

SPEC = ModelSpec(
    "tiny", depth=3, num_heads=2, head_dim=8, latent_channels=4, out_channels=4, txt_dim=24, pooled_dim=20,
    pos_max_size=8, pos_base_size=4, dual_attention_blocks=(0, 1),
)  # fmt: skip


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document, after checking that the text for people is there too."""
    assert main([str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == err
    data: dict[str, Any] = json.loads(out)
    return data


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(bytes(1234))
    check = {"binding": True, "errors": {"rel_l2": 1e-4}}
    chain = {"binding": False, "errors": {"rel_l2": 9.0}}
    worst = {"binding": True, "errors": {"rel_l2": 2.5e-3}}
    verdict = {"target": "ort-cpu", "passed": True, "checks": [check, chain, worst], "not_executed": ["a GPU"]}
    (folder / "parity.json").write_text(json.dumps({"verdicts": [verdict]}))
    write_manifest(
        folder,
        {
            "name": SPEC.name,
            "precision": "fp16",
            "spec": SPEC.to_json(),
            "contract": Contract.of(SPEC, precision("fp16")).to_json(),
            "weights": {"origin": "random (seed 7)", "random": True, "seed": 7},
            "outputs": [],
            "engines": {"ort-cpu": {"graph": "model.ort.onnx", "execution": "ONNX Runtime on CPU"}},
            "versions": {"torch": "2.13.0"},
        },
    )
    return folder


def test_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is no checkpoint of ours."""
    path = tmp_path / "weights.safetensors"
    save_file({"some.bias": torch.zeros(16).bfloat16(), "x": torch.zeros(2, 3)}, path, {"format": "pt"})
    data = inspect(path, capsys)
    assert data["kind"] == "safetensors" and data["problem"] is None and data["parameters"] == 22
    assert set(data["tensors"]) == {"some.bias", "x"} and data["metadata"] == {"format": "pt"}
    assert data["tensors"]["some.bias"] == {"dtype": "bfloat16", "shape": [16], "bytes": 32}


def test_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = inspect(bundle, capsys)
    assert data["kind"] == "bundle" and data["precision"] == "fp16"
    assert data["weights"]["origin"] == "random (seed 7)" and set(data["engines"]) == {"ort-cpu"}
    assert data["files"]["weights.safetensors"] == 1234
    (verdict,) = data["verdicts"]
    assert verdict == {
        "target": "ort-cpu", "passed": True, "engine_executed": True, "checks": 2, "worst_rel_l2": 2.5e-3,
        "not_executed": ["a GPU"],
    }  # fmt: skip
    assert main([str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "random (seed 7)" in out and "not executed: a GPU" in out and "encoder_hidden_states" in out
    assert "  torch  2.13.0" in out and data["versions"] == {"torch": "2.13.0"}
    assert "profiles" not in out  # one, which is the ranges


@pytest.mark.parametrize("error", ["0.5", [1], True, 10**400])
def test_verdicts_that_are_no_figures(error: object, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity = bundle / "parity.json"
    checks = [{"binding": True, "errors": {"rel_l2": error}}]
    verdict = {"target": "ort-cpu", "passed": True, "checks": checks, "not_executed": []}
    parity.write_text(json.dumps({"verdicts": [verdict]}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"], manifest["format"]
    write_manifest(bundle, manifest)
    assert main([str(bundle)]) == 2
    err = capsys.readouterr().err
    assert "parity.json must hold the verdicts" in err and "Traceback" not in err


def test_a_bundle_with_one_byte_changed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = bundle / "weights.safetensors"
    weights.write_bytes(bytes(1233) + b"\1")
    assert main([str(bundle)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "weights.safetensors" in err and "SHA-256" in err


def test_a_bundle_without_verdicts(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "parity.json").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["parity.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(bundle)]) == 0
    assert "not verified" in capsys.readouterr().out


def nested(depth: int) -> onnx.ModelProto:
    """A chain of functions that each call the next one twice: 2^depth executed nodes in a small file."""
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mine", 1)]
    functions = [helper.make_function("mine", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)]
    for i in range(1, depth + 1):
        calls = [helper.make_node(f"F{i - 1}", [x], [y], domain="mine") for x, y in (("a", "half"), ("half", "b"))]
        functions.append(helper.make_function("mine", f"F{i}", ["a"], ["b"], calls, opsets))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node(f"F{depth}", ["x"], ["y"], domain="mine")], "nested", [x], [y])
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)


def test_onnx_with_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    model = nested(3)
    weights = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT16, dims=[4])
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "8")):
        weights.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    data = inspect(path, capsys)
    assert data["ops"] == {"Relu": 8} and data["opsets"] == {"ai.onnx": 23, "mine": 1}
    assert data["inputs"] == [{"name": "x", "dtype": "float16", "axes": ["batch", 4]}]
    assert data["external"] == [{"location": "weights.bin", "tensors": 1, "bytes": 8, "found": False}]
    assert "does not exist" in data["problem"]
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    data = inspect(path, capsys)
    assert data["external"][0]["found"] and data["problem"] is None


def test_onnx_with_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    model = nested(1)
    model.graph.node[0].input[0] = "nowhere"
    path.write_bytes(model.SerializeToString())
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "'nowhere', which nothing makes" in out and "executed nodes" in out


@pytest.mark.parametrize("depth", [60, 3000])
def test_a_small_file_that_runs_for_ever_is_counted_at_once(
    depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(nested(depth).SerializeToString())
    assert inspect(path, capsys)["ops"]["Relu"] == 10**15  # or more


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    model = nested(1)
    model.producer_name = "evil\x1b[2J\r\u202e"
    path.write_bytes(model.SerializeToString())
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "evil" in out and not set("\x1b\r\u202e") & set(out)


@pytest.mark.parametrize("name", ["", "notes.txt", "none", "none.engine", "none.onnx", "none.safetensors", "org/name"])
def test_anything_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert main([name or "."]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "received:" in err and "fix:" in err and "Traceback" not in err
    assert ("hf download" in err) == (name == "org/name")


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_broken_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    for content in (b"", b"\x00" * 64, b"PK\x03\x04" + bytes(64)):
        path.write_bytes(content)
        assert main([str(path)]) == 2
        assert "Traceback" not in capsys.readouterr().err
