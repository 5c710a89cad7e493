"""Export from Python: everything that the command does, and that nothing heavy begins before the checks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import BundleError, MachineError, ParityError, UsageError
from mmdit_deploy.export import ExportRequest, export, pipeline, preflight, versions
from mmdit_deploy.families import preset
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth
from mmdit_deploy.verification import verify_bundle

SMALL = {"batch": Range(1, 1, 1), "img_tokens": Range(4, 16, 16), "txt_tokens": Range(1, 8, 8)}


@pytest.fixture
def request_(tiny_spec: ModelSpec, tmp_path: Path) -> ExportRequest:
    """A small export to ``tmp_path/out/b``."""
    return ExportRequest(tiny_spec, RandomWeights(0), PRECISIONS["fp16"], out=tmp_path / "out" / "b", ranges=SMALL)


@pytest.fixture
def traced(traced_once: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Exports of this test take graphs that the session has traced already."""
    with traced_once():
        yield


@pytest.mark.usefixtures("room_for_large_models")
@pytest.mark.parametrize(
    ("spec", "precision", "billions", "gigabytes"),
    [
        (from_depth(24), "fp16", 2.03, 4.06),
        (preset("sd3-medium"), "fp16", 2.03, 4.06),
        (preset("sd3.5-large"), "bf16", 8.06, 16.1),
        (from_depth(24), "fp32", 2.03, 8.11),
    ],
)
def test_preflight_says_what_is_needed(
    spec: ModelSpec, precision: str, billions: float, gigabytes: float, tmp_path: Path
) -> None:
    request = ExportRequest(spec, RandomWeights(0), PRECISIONS[precision], out=tmp_path / "b")
    needs = preflight(request)
    assert needs.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert needs.weights_bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert needs.weights_bytes < needs.disk_bytes < needs.weights_bytes + 10**8
    graphs = preflight(dataclasses.replace(request, graph_only=True))
    assert graphs.disk_bytes < 10**8
    assert "B parameters" in needs.text()


def test_a_small_disk_is_told_before_the_work(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    with pytest.raises(MachineError, match="on the disk"):
        preflight(request_)
    assert asked == [tmp_path]  # the nearest folder that is there; `out` is not
    assert not (tmp_path / "out").exists()


def test_the_directory() -> None:
    request = ExportRequest(from_depth(3), RandomWeights(0), PRECISIONS["bf16"])
    assert request.directory == Path("dist/mmdit-3-bf16")
    assert dataclasses.replace(request, graph_only=True).directory == Path("dist/mmdit-3-bf16-graph")
    assert dataclasses.replace(request, out=Path("x")).directory == Path("x")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"targets": ("tpu",)}, UsageError),
        ({"targets": ("trt",)}, MachineError),
        ({"outputs": ("blocks.9",)}, UsageError),
        ({"outputs": ("blocks.0", "blocks.0")}, UsageError),
        ({"ranges": {"image_tokens": Range(1, 2, 3)}}, UsageError),
        ({"ranges": {"img_tokens": Range(1, 2, 10**6)}}, UsageError),
    ],
)
def test_a_bad_request_is_refused_before_the_work(
    request_: ExportRequest, changes: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "build_graphs", lambda *_, **__: pytest.fail("said too late"))
    request = dataclasses.replace(request_, **changes)
    for call in (preflight, export):
        with pytest.raises(error) as caught:
            call(request)
        assert caught.value.received and caught.value.fix
    assert request.out is not None and not request.out.parent.exists()


def test_the_result_and_the_log(request_: ExportRequest, traced: None) -> None:
    said: list[str] = []
    result = export(request_, said.append)
    assert result.path == request_.out
    assert [v.passed for v in result.verdicts] == [True]
    assert said[0] == "weights: random (seed 0) — no checkpoint was given"
    assert said[1].startswith("graph: 8 kinds of call traced")
    assert said[-1].startswith("PASS  b on ort-cpu, fp16")
    assert open_bundle(result.path).contract.ranges["img_tokens"] == Range(4, 16, 16)


def test_one_target_named_twice_is_built_once(request_: ExportRequest, traced: None) -> None:
    result = export(dataclasses.replace(request_, targets=("ort-cpu", "ort-cpu")))
    assert len(result.verdicts) == 1


def test_an_existing_bundle_is_refused_before_the_work(
    request_: ExportRequest, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(dataclasses.replace(request_, verify=False))
    monkeypatch.setattr(pipeline, "build_graphs", lambda *_, **__: pytest.fail("said too late"))
    with pytest.raises(BundleError, match="replaced on request only"):
        export(request_)


def test_a_bundle_out_of_tolerance_is_not_left(
    request_: ExportRequest, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = pipeline.verify_against_weights

    def other_weights(engine: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        return verify(engine, RandomWeights(1), *args, **kwargs)

    monkeypatch.setattr(pipeline, "verify_against_weights", other_weights)
    with pytest.raises(ParityError, match=r"conditioning \(local\)") as caught:
        export(request_)
    assert caught.value.exit_status == 1 and "--no-verify" in str(caught.value)
    assert request_.out is not None and list(request_.out.parent.iterdir()) == []


def test_a_reference_that_is_too_large_is_left_out_and_said(
    request_: ExportRequest, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit_deploy.verify.reference.MAX_BYTES", 1000)
    said: list[str] = []
    result = export(request_, said.append)
    assert result.verdicts[0].passed
    assert any(line.startswith("reference.safetensors: 0 of") for line in said)
    assert "reference.safetensors" not in open_bundle(result.path).manifest.files


def test_versions_name_what_decides_the_result() -> None:
    assert {"python", "torch", "onnx", "onnxscript", "numpy"} <= set(versions())


def test_preflight_sees_what_is_in_the_bundles_place(request_: ExportRequest) -> None:
    """A dry run that succeeds means that the run begins."""
    assert request_.out is not None
    request_.out.mkdir(parents=True)
    (request_.out / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(BundleError, match="out/b exists"):
            preflight(dataclasses.replace(request_, force=force))
    assert (request_.out / "notes.txt").read_text() == "mine"


def test_exposed_blocks_are_compared_too(request_: ExportRequest, traced: None) -> None:
    """The whole engine returns a block's tokens: they are held against the eager model's, now and without weights."""
    result = export(dataclasses.replace(request_, outputs=("blocks.0",)))
    assert {c.name for c in result.verdicts[0].checks if c.level == "engine"} == {"sample", "blocks.0"}
    again = verify_bundle(result.path)
    assert again.passed and {c.name for c in again.checks if c.level == "engine"} == {"sample", "blocks.0"}


def test_no_target_is_refused(request_: ExportRequest) -> None:
    with pytest.raises(UsageError, match="at least one target"):
        export(dataclasses.replace(request_, targets=()))
