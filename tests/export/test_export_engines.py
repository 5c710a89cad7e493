"""Export with TensorRT engines, from end to end on a machine without a GPU: built, gated, and never called executed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mmdit_deploy.build import RTX
from mmdit_deploy.build.layers_file import read_layers
from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.cli import bench as bench_command
from mmdit_deploy.cli import verify as verify_command
from mmdit_deploy.errors import GraphError, MachineError
from mmdit_deploy.export import ExportRequest, export, versions
from mmdit_deploy.graph.lower import DIALECTS
from mmdit_deploy.graph.passes import Pass
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import calls
from mmdit_deploy.runtime import Engine
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verification import verify_bundle

pytestmark = pytest.mark.usefixtures("tensorrt_rtx", "no_gpu")

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
FILES = {
    "manifest.json", "model.onnx", "model.trt.onnx", "weights.safetensors", "reference.safetensors", "parity.json",
    "report.html", *(f"engines/rtx-sm89/{name}" for name in ("build.log", "layers.json", "segment-0.engine")),
}  # fmt: skip


BOTH = ("ort-cpu", "rtx:sm89")


def test_the_bundle(exported: Callable[..., Any]) -> None:
    made = exported(*BOTH)
    names = {p.relative_to(made.path).as_posix() for p in made.path.rglob("*") if p.is_file()}
    assert names == FILES | {"model.ort.onnx"}
    files = open_bundle(made.path, verify=True).manifest.files
    assert set(files) == names - {"manifest.json"}
    for name in names - {"manifest.json"}:
        assert files[name].size == (made.path / name).stat().st_size


def test_what_the_manifest_says_of_the_engine(exported: Callable[..., Any], deep_spec: ModelSpec) -> None:
    made = exported(*BOTH)
    entry = made.fields["engines"]["rtx:sm89"]
    assert (entry["graph"], entry["dialect"]) == ("model.trt.onnx", "trt")
    assert (entry["flavour"], entry["version"]) == ("TensorRT-RTX", RTX.version())
    assert entry["capabilities"] == ["8.9"] and entry["attention"] == "fused"
    assert entry["execution"] == "TensorRT-RTX, fp16 kernels, fused attention"
    assert entry["profiles"] == [{"batch": [1, 1, 2], "img_tokens": [4, 16, 48], "txt_tokens": [2, 8, 16]}]
    assert entry["fused_attentions"] == dict.fromkeys(BLOCKS, 1)
    kernels = entry["kernels"]
    assert sum(kernels["by_type"].values()) == sum(kernels["by_call"].values()) == kernels["total"] > 0
    assert set(BLOCKS) < set(kernels["by_call"]) and kernels["by_type"]["runtime_fusion"] > 0  # products with a bias
    (segment,) = entry["segments"]
    assert segment["calls"] == [call.path for call in calls(deep_spec)]
    assert {t["name"] for t in segment["inputs"]} == {t["name"] for t in made.fields["contract"]["inputs"]}
    assert segment["outputs"] == made.fields["contract"]["outputs"]
    assert entry["bytes"] == segment["bytes"] == (made.path / segment["file"]).stat().st_size
    assert entry == {**entry, **made.result.engines["rtx:sm89"].to_json()}
    assert set(made.fields["engines"]["ort-cpu"]) == {"graph", "dialect", "execution"}


def test_the_layer_list_is_beside_the_engine(exported: Callable[..., Any]) -> None:
    made = exported(*BOTH)
    record, (file,) = read_layers(made.path / "engines/rtx-sm89/layers.json")
    assert record.to_json() == made.result.engines["rtx:sm89"].to_json()
    assert file.sha256 == open_bundle(made.path).manifest.files[file.segment.file].sha256
    assert sum(layer.is_kernel for layer in file.layers) == record.kernels
    assert [layer.sources[0][1] for layer in file.layers if layer.is_fused_attention] == list(BLOCKS)


def test_versions_name_what_built_it(exported: Callable[..., Any]) -> None:
    package = next(name for name in RTX.distributions if name in versions())
    assert exported(*BOTH).fields["versions"][package] == metadata.version(package) == RTX.version()


def test_what_was_not_run_is_not_called_run(exported: Callable[..., Any]) -> None:
    made = exported(*BOTH)
    assert made.fields["verified"] == ["ort-cpu"]
    ort, rtx = made.verdict("ort-cpu"), made.verdict("rtx:sm89")
    assert ort["passed"] and ort["engine_executed"] and ort["not_executed"] == []
    assert rtx["passed"] and not rtx["engine_executed"]
    (item,) = rtx["not_executed"]
    assert item.startswith("the engine: built, not executed: the engine rtx:sm89 needs an NVIDIA GPU")
    assert rtx["executed"] == [
        "its graph, one call of each of 8 kinds, 9 cases: ONNX Runtime on CPU, fp16 through casts around fp32 kernels"
    ]
    assert not any(check["level"] == "engine" for check in rtx["checks"])
    kinds = {"conditioning", "img_embed", "txt_embed", "modulations.0.img", "modulations.2.txt", "final"}
    assert {check["name"] for check in rtx["checks"]} == {*kinds, "blocks.0", "blocks.2"}
    assert "built, not executed" in (made.path / "report.html").read_text(encoding="utf-8")


def test_the_log(exported: Callable[..., Any]) -> None:
    made = exported(*BOTH)
    assert "build: rtx:sm89, conditioning to final" in made.said
    (summary,) = [line for line in made.said if line.startswith("build: rtx:sm89: ")]
    kernels = made.result.engines["rtx:sm89"].kernels
    assert f"{kernels} kernels, 3 of 3 attentions fused" in summary  # and no warning of the builder
    heads = [line.splitlines()[0] for line in made.said if "tolerance" in line]
    assert heads[0].startswith("PASS  b on ort-cpu, fp16")
    assert heads[1].startswith("NOT EXECUTED  b on rtx:sm89, fp16")
    assert "its graph is within tolerance" in heads[1]


def test_what_can_run_here_runs(exported: Callable[..., Any]) -> None:
    path = exported(*BOTH).path
    assert verify_bundle(path).target == "ort-cpu" and verify_bundle(path).passed
    assert Engine.load(path).target == "ort-cpu"


@pytest.mark.parametrize("command", [verify_command, bench_command])
def test_an_engine_asked_for_by_name_that_cannot_run_is_never_0(
    exported: Callable[..., Any], command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(exported(*BOTH).path), "--engine", "rtx:sm89"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and "rtx:sm89 needs an NVIDIA GPU of compute capability 8.9" in err and "fix:" in err


def test_with_no_other_target_the_graph_is_verified_in_full(exported: Callable[..., Any]) -> None:
    made = exported("rtx:sm89")
    names = {p.relative_to(made.path).as_posix() for p in made.path.rglob("*") if p.is_file()}
    assert names == FILES
    assert made.fields["verified"] == []
    verdict = made.verdict("rtx:sm89")
    assert verdict["passed"] and not verdict["engine_executed"]
    assert verdict["executed"][0].startswith("its graph, 14 calls one by one, 9 cases: ONNX Runtime on CPU")
    assert {check["level"] for check in verdict["checks"]} == {"local", "cumulative", "output"}


@pytest.mark.parametrize("command", [verify_command, bench_command])
def test_a_bundle_that_cannot_run_here_is_not_verified(
    exported: Callable[..., Any], command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported("rtx:sm89").path
    assert command.main([str(path)]) == 3
    assert "rtx:sm89" in capsys.readouterr().err
    with pytest.raises(MachineError, match="needs an engine that this machine can run"):
        Engine.load(path)


def test_without_verification_nothing_is_claimed(exported: Callable[..., Any]) -> None:
    made = exported("rtx:sm89", verify=False)
    assert made.result.verdicts == () and made.fields["verified"] == []
    assert not (made.path / "parity.json").exists()
    assert made.fields["engines"]["rtx:sm89"]["fused_attentions"] == dict.fromkeys(BLOCKS, 1)  # the gate is no option


@pytest.mark.parametrize(("precision", "fused"), [("bf16", 1), ("fp32", 0)])
def test_other_precisions(exported: Callable[..., Any], precision: str, fused: int) -> None:
    made = exported(*BOTH, precision=precision)
    entry = made.fields["engines"]["rtx:sm89"]
    assert entry["fused_attentions"] == dict.fromkeys(BLOCKS, fused)
    words = "3 of 3 attentions fused" if fused else "3 attentions written out"
    assert any(words in line for line in made.said)
    assert entry["attention"] == ("fused" if fused else "written out")
    verdict = made.verdict("rtx:sm89")
    assert verdict["passed"] and not verdict["engine_executed"]
    assert ("emulated" in verdict["executed"][0]) == (precision == "bf16")
    dtypes = {t["dtype"] for t in entry["segments"][0]["inputs"]}
    assert dtypes == {"float32", {"bf16": "bfloat16", "fp32": "float32"}[precision]}


def test_two_engines_of_one_bundle(exported: Callable[..., Any]) -> None:
    """The second one's graph is compared once per kind of call: it can differ in nothing else."""
    made = exported("rtx:sm89", "rtx:sm120+sm86")
    engines = made.fields["engines"]
    assert list(engines) == ["rtx:sm89", "rtx:sm86+sm120"]
    assert engines["rtx:sm86+sm120"]["capabilities"] == ["8.6", "12.0"]
    assert (made.path / "engines/rtx-sm86+sm120/segment-0.engine").is_file()
    assert [v.target for v in made.result.verdicts] == list(engines)
    assert "14 calls" in made.verdict("rtx:sm89")["executed"][0]
    assert "8 kinds" in made.verdict("rtx:sm86+sm120")["executed"][0]


def _softmax_for_gelu(model: ir.Model) -> int:
    gelus = [node for f in model.functions.values() for node in f if node.op_type == "Gelu"]
    for node in gelus:
        node.op_type = "Softmax"
        node.attributes.clear()
    return len(gelus)


def test_a_gpu_without_room_does_not_cost_the_engines(
    deep_spec: ModelSpec,
    traced_once: Callable[[], contextlib.AbstractContextManager[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its graph is verified, and the rest is for a later run of mmdit-verify, which is no success either."""

    def no_room(*_: object, **__: object) -> None:
        raise MachineError("the engine rtx:sm89 must fit into the GPU's memory", received="1 GB are free")

    monkeypatch.setattr("mmdit_deploy.verify.whole.check_runs_here", lambda *_: None)
    monkeypatch.setattr("mmdit_deploy.verify.whole.open_runner", no_room)
    request = ExportRequest(deep_spec, RandomWeights(0), PRECISIONS["fp16"], targets=("rtx:sm89",), out=tmp_path / "b")
    with traced_once():
        (verdict,) = export(request).verdicts
    assert verdict.passed and not verdict.engine_executed and verdict.machine == {}
    assert verdict.not_executed == (
        "the engine: built, not executed: the engine rtx:sm89 must fit into the GPU's memory; here: 1 GB are free",
    )
    assert open_bundle(tmp_path / "b").manifest.fields["verified"] == []

    monkeypatch.setattr("mmdit_deploy.verification.check_runs_here", lambda *_: None)
    for arguments in ([], ["--full"]):
        assert verify_command.main([str(tmp_path / "b"), "--engine", "rtx:sm89", *arguments]) == 3
    assert "NOT EXECUTED" in capsys.readouterr().out


def test_a_fusion_miss_leaves_no_bundle(
    deep_spec: ModelSpec,
    graphs_of: Callable[..., Graphs],
    traced_once: Callable[[], contextlib.AbstractContextManager[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gate reads what was built: it sees what no check of our own graphs was asked about."""
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(logs))
    graphs_of(deep_spec, "fp16", ("trt", "standard"))  # before lowering is broken
    broken: Sequence[Pass] = (*DIALECTS["trt"], Pass("broken", _softmax_for_gelu))
    monkeypatch.setitem(DIALECTS, "trt", tuple(broken))
    request = ExportRequest(deep_spec, RandomWeights(0), PRECISIONS["fp16"], targets=("rtx:sm89",), out=tmp_path / "b")
    with traced_once(), pytest.raises(GraphError) as caught:
        export(request)
    said = str(caught.value.received)
    assert caught.value.exit_status == 3 and caught.value.rule.startswith("rtx:sm89: each attention of the spec")
    assert "blocks.0: 2 Gelu expected, 0 in the graph" in said and "0 Softmax expected, 2 in the graph (node_" in said
    (log,) = logs.iterdir()  # what the builder said outlives the bundle that was not made
    assert str(log) in str(caught.value.fix) and "] Layers:" in log.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [logs]
