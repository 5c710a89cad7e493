"""`mmdit-export` with TensorRT engines: the plan, the words, the JSON, and Ctrl-C in the middle of a build."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mmdit_deploy
from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec

pytestmark = pytest.mark.usefixtures("tensorrt_rtx")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: an engine that cannot run is what these tests are about."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("cut", [("--segments", "2"), ("--segments", "auto"), ()])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    run: Callable[..., Any], checkpoint: Path, dist: Path, ranges: tuple[str, ...], cut: tuple[str, ...]
) -> None:
    count = 2 if "2" in cut else 1
    arguments = (*ranges, "--target", "ort-cpu", "--target", "rtx:sm89+sm86", *cut)
    result = run("export", checkpoint, *arguments, "-o", dist / "deep" / "b", "--dry-run", "--json")
    assert result.status == 0, result.err
    plan = result.json
    assert plan["dry_run"] is True and plan["segments"] == {"rtx:sm86+sm89": count}
    names = [stage["name"] for stage in plan["stages"]]
    build = f"build rtx:sm86+sm89 ({count} segment{'s' if count > 1 else ''})"
    assert names == [
        "calibrate", "fp16 plan", "graph", "weights", build,
        "verify ort-cpu", "verify ort-cpu (whole engine)", "verify model.onnx",
    ]  # fmt: skip
    assert plan["memory_bytes"] > 0 and plan["disk_bytes"] > 2 * plan["weights_bytes"]
    assert all(name in result.err for name in names) and "dry run: nothing was written" in result.err
    assert os.listdir(dist) == []


def test_without_a_target_an_engine_is_built_ahead_of_time(
    run: Callable[..., Any], checkpoint: Path, ranges: tuple[str, ...], dist: Path
) -> None:
    result = run("export", checkpoint, *ranges, "-o", dist / "b", "--dry-run", "--json")
    assert result.status == 0 and result.json["segments"] == {"rtx:sm89": 1}
    assert "verify ort-cpu" in [stage["name"] for stage in result.json["stages"]]


def test_words_and_json_say_what_was_executed(
    run: Callable[..., Any], checkpoint: Path, ranges: tuple[str, ...], dist: Path
) -> None:
    targets = ("--target", "ort-cpu", "--target", "rtx:sm89", "--segments", "2", "--profile", "img_tokens=16")
    result = run("export", checkpoint, *ranges, *targets, "-o", dist / "b", "--json")
    assert result.status == 0, result.err
    data = result.json
    assert list(data["engines"]) == ["rtx:sm89"] and data["segments"] == {"rtx:sm89": 2}
    engine = data["engines"]["rtx:sm89"]
    assert len(engine["segments"]) == 2 and engine["capabilities"] == ["8.9"]
    assert engine["fused_attentions"] == {"blocks.0": 1, "blocks.1": 1}
    assert [profile["img_tokens"] for profile in engine["profiles"]] == [[16, 16, 16]]
    assert {v["target"]: v["engine_executed"] for v in data["verdicts"]} == {"ort-cpu": True, "rtx:sm89": False}
    assert {**open_bundle(dist / "b").manifest.fields["engines"]["rtx:sm89"], **engine} == (
        open_bundle(dist / "b").manifest.fields["engines"]["rtx:sm89"]
    )
    last = result.err.strip().splitlines()[-1]
    assert last.endswith("bundle written, ort-cpu verified; rtx:sm89 built, not executed (model.onnx verified)")
    assert "build: rtx:sm89 segment 2 of 2, " in result.err and "2 of 2 attentions fused" in result.err
    assert "NOT EXECUTED  b on rtx:sm89" in result.err
    # A later run of what cannot run is no success, whatever else the bundle has.
    for command in ("verify", "bench"):
        run(command, dist / "b", "--engine", "rtx:sm89").refused(3, "rtx:sm89", "NVIDIA GPU of compute capability 8.9")
    assert " on ort-cpu, fp16" in run("verify", dist / "b").out


def test_unverified_engines_are_called_so(
    run: Callable[..., Any], checkpoint: Path, ranges: tuple[str, ...], dist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run, so ONNX Runtime is not needed."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("export", checkpoint, *ranges, "--target", "rtx:sm89", "--no-verify", "-o", dist / "b")
    assert result.status == 0, result.err
    assert result.out.endswith("bundle written, rtx:sm89 built, not executed (NOT verified)\n")


# Graphs come from a file, and nothing is calibrated: tracing takes seconds, and these tests are about what is after it.
COMMAND = """
import pickle, signal, sys
from unittest import mock
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
from mmdit_deploy.cli.export import main
with open(sys.argv.pop(1), "rb") as file:
    graphs = pickle.load(file)
with mock.patch("mmdit_deploy.export.pipeline.build_graphs", lambda *_, **__: graphs):
    sys.exit(main())
"""


PLAIN = ("--fp16-plan", "pure")


@pytest.fixture
def building(
    checkpoint: Path,
    checkpoint_spec: ModelSpec,
    graphs_of: Callable[..., Graphs],
    ranges: tuple[str, ...],
    tmp_path: Path,
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """An export in a process of its own whose builder has begun, and the folder of its bundle."""
    graphs, parent = tmp_path / "graphs", tmp_path / "dist"
    graphs.write_bytes(pickle.dumps(graphs_of(checkpoint_spec, "fp16", ("trt", "standard"))))
    parent.mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND,
            graphs,
            checkpoint,
            *ranges,
            *PLAIN,
            "--target",
            "rtx:sm89",
            "-o",
            parent / "b",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(mmdit_deploy.__file__).parents[1])},
    )
    deadline = time.monotonic() + 120
    while not list(parent.glob(".partial-*/bundle/engines/*/segment-0.engine")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    yield process, parent
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_while_an_engine_is_built_leaves_nothing(
    building: tuple[subprocess.Popen[str], Path], number: int, status: int
) -> None:
    process, parent = building
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.endswith("interrupted\n") and "Traceback" not in err and "fix:" not in err
    assert out == "" and os.listdir(parent) == []
