"""One engine built for real, on this machine without a GPU, and everything that may go wrong while it is built."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from mmdit_deploy import hashed_file
from mmdit_deploy.build import RTX
from mmdit_deploy.build import progress as progress_module
from mmdit_deploy.build.build_log import BuildLog
from mmdit_deploy.build.engine_builder import BuiltEngine, build_engine
from mmdit_deploy.build.progress import BuildProgress
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import GraphError, MachineError, MissingPackageError

pytestmark = pytest.mark.usefixtures("tensorrt_rtx")

WIDTH = 32
RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(2, 8, 16)}
ATTENTION = "a = Attention<q_num_heads=2, kv_num_heads=2>(q, x, x)"


def small_graph(folder: Path, dtype: str = "float16", attention: str = ATTENTION) -> onnx.ModelProto:
    """A projection, whose weights go to a file, and an attention."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23]>
        small ({dtype}[batch,img_tokens,{WIDTH}] x) => ({dtype}[batch,img_tokens,{WIDTH}] y)
        {{ q = MatMul(x, w) [attn] {attention} y = Add(a, x) }}"""
    )
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype({"float16": "f2", "float": "f4"}[dtype])
    (folder / "weights.bin").write_bytes(weights.tobytes())
    element = {"float16": onnx.TensorProto.FLOAT16, "float": onnx.TensorProto.FLOAT}[dtype]
    stored = model.graph.initializer.add(name="w", dims=weights.shape, data_type=element)
    stored.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": 0, "length": weights.nbytes}.items():
        stored.external_data.add(key=key, value=str(value))
    return model


@pytest.fixture
def warned() -> list[str]:
    """What reached the user."""
    return []


@pytest.fixture
def log(tmp_path: Path, warned: list[str]) -> Iterator[BuildLog]:
    """An open build log."""
    with BuildLog(tmp_path / "build.log", warned.append) as log:
        yield log


@pytest.fixture
def build(tmp_path: Path, log: BuildLog) -> Callable[..., BuiltEngine]:
    """Builds a graph to ``small.engine``, for one capability and one profile where nothing else is said."""

    def call(graph: onnx.ModelProto, **changes: Any) -> BuiltEngine:
        options = {"flavour": RTX, "log": log, "profiles": [RANGES], "capabilities": ["sm89"], **changes}
        flavour, to = options.pop("flavour"), options.pop("log")
        return build_engine(flavour, graph, tmp_path, tmp_path / "small.engine", to, **options)

    return call


def test_one_file_for_several_capabilities_and_profiles(
    tmp_path: Path, build: Callable[..., BuiltEngine], log: BuildLog, warned: list[str]
) -> None:
    graph = small_graph(tmp_path)
    before = graph.SerializeToString(deterministic=True)
    one_size = {**RANGES, "img_tokens": Range(16, 16, 16)}
    built = build(graph, capabilities=["sm86", "sm120"], profiles=[RANGES, one_size])
    data = (tmp_path / "small.engine").read_bytes()
    assert (built.file.size, built.file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(re.findall(rb"sm\d+", data)) == {b"sm86", b"sm120"}
    attentions = Counter(layer.profile for layer in built.layers if layer.is_fused_attention)
    assert attentions == {0: 1, 1: 1}
    assert all(layer.sources == (("attn", ""),) for layer in built.layers if layer.is_fused_attention)
    assert graph.SerializeToString(deterministic=True) == before
    assert warned == [] and log.errors == [] and built.seconds > 0
    assert "Layers:" in (tmp_path / "build.log").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["build.log", "small.engine", "weights.bin"]


def test_fp32_with_attention_written_out(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    built = build(small_graph(tmp_path, "float"), fused_attention=False)
    kernels = [layer for layer in built.layers if ("attn", "") in layer.sources]
    assert not any(kernel.is_fused_attention for kernel in kernels)
    assert sum(kernel.has_exponential for kernel in kernels) == 1


def test_fp32_with_fused_attention_cannot_be(
    tmp_path: Path, build: Callable[..., BuiltEngine], warned: list[str]
) -> None:
    """Why attention is written out: this is what TensorRT-RTX says, and the user is told so."""
    with pytest.raises(GraphError, match="TensorRT-RTX must be able to build small") as caught:
        build(small_graph(tmp_path, "float"))
    assert caught.value.exit_status == 3 and "dedicated kernel" in str(caught.value.received)
    assert "constraints.txt" in str(caught.value.fix)
    assert any("dedicated kernel" in line for line in warned)
    assert not (tmp_path / "small.engine").exists()


def test_a_graph_that_the_parser_does_not_understand(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    """It is said which node of which call, and why."""
    graph = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23, "mmdit": 1]>
        small (float16[batch,img_tokens,{WIDTH}] x) => (float16[batch,img_tokens,{WIDTH}] y)
        {{ ["blocks.0"] y = mmdit.Block(x) }}
        <domain: "mmdit", opset_import: ["": 23]> Block (x) => (y) {{ q = Relu(x) [bad] y = Frobnicate(q) }}"""
    )
    with pytest.raises(GraphError, match="TensorRT's parser must understand the graph small") as caught:
        build(graph)
    said = str(caught.value.received)
    assert said.startswith("bad (Frobnicate) in blocks.0 (Block): ") and "Plugin not found" in said
    assert caught.value.exit_status == 3 and not (tmp_path / "small.engine").exists()


def test_weights_that_are_missing(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    graph = small_graph(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(GraphError, match="must understand the graph small") as caught:
        build(graph)
    assert "Failed to import initializer: w" in str(caught.value.received)
    assert not (tmp_path / "small.engine").exists()


@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_fills_up_while_the_engine_is_streamed(
    tmp_path: Path, build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write, calls = os.write, iter(range(10**6))

    def full(fd: int, data: memoryview) -> int:
        if next(calls) < after:
            return write(fd, data[: len(data) // 2 + 1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hashed_file.os, "write", full)
    with pytest.raises(MachineError, match=r"small\.engine needs 2048 bytes.* on the disk") as caught:
        build(small_graph(tmp_path))
    assert caught.value.exit_status == 3 and caught.value.received == "No space left on device while writing"
    assert not (tmp_path / "small.engine").exists()


def test_memory_that_ran_out_is_told_with_what_helps(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    class Short(BuildLog):
        def message(self, severity: str, text: str) -> None:
            said = "Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)"
            super().message(severity, said if severity == "ERROR" else text)

    with Short(tmp_path / "build.log", lambda _: None) as log, pytest.raises(MachineError) as caught:
        build(small_graph(tmp_path, "float"), log=log)
    assert "needs more memory" in caught.value.rule and "17179869184" in str(caught.value.received)
    assert "--segments" in str(caught.value.fix)


def test_an_existing_file_is_left_alone(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    (tmp_path / "small.engine").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        build(small_graph(tmp_path))
    assert (tmp_path / "small.engine").read_bytes() == b"precious"


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_graph(tmp_path)
    with pytest.raises(MissingPackageError, match="building with TensorRT-RTX needs the package") as caught:
        build(graph, flavour=dataclasses.replace(RTX, module="no_such_tensorrt"))
    assert (caught.value.exit_status, caught.value.received) == (3, "it is not installed")
    assert caught.value.fix == "pip install 'mmdit-deploy[rtx]'"
    # Installed, and one of its libraries is not: that is what to look for.
    (tmp_path / "half_a_tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError) as caught:
        build(graph, flavour=dataclasses.replace(RTX, module="half_a_tensorrt"))
    assert caught.value.received == "libnvinfer.so.10: cannot open shared object file"
    assert "half_a_tensorrt" not in sys.modules
    # Too old, or just old enough; 1.10 is later than 1.7.
    for version, fits in (("1.6.9.99", False), ("1.7", True), ("1.7.1.116.post1", True), ("1.10.0.1", True)):
        monkeypatch.setitem(sys.modules, "some_tensorrt", SimpleNamespace(__version__=version))
        flavour = dataclasses.replace(RTX, module="some_tensorrt")
        if fits:
            assert flavour.load("a test").__version__ == version
            continue
        with pytest.raises(MachineError, match=r"building with TensorRT-RTX needs TensorRT-RTX 1\.7 or later") as old:
            build(graph, flavour=flavour)
        assert (old.value.received, old.value.fix) == (f"TensorRT-RTX {version}", RTX.install)
        assert old.value.exit_status == 3
    assert not (tmp_path / "small.engine").exists()


@pytest.fixture
def eager_reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A report at every step, and a SIGINT that raises KeyboardInterrupt whatever the shell had arranged."""
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_REPORTS", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("eager_reports")
def test_progress_is_reported(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    said: list[tuple[str, int, int]] = []
    build(small_graph(tmp_path), progress=BuildProgress(lambda *args: said.append(args)))
    assert len({phase for phase, _, _ in said}) > 3
    assert all(0 <= done < steps for _, done, steps in said)


@pytest.mark.usefixtures("eager_reports")
def test_ctrl_c_ends_the_build_and_leaves_no_file(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    def report(*_: object) -> None:
        if not progress.cancelled:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 60
            while not progress.cancelled and time.monotonic() < deadline:
                time.sleep(0.01)

    progress = BuildProgress(report)
    with pytest.raises(KeyboardInterrupt):
        build(small_graph(tmp_path), progress=progress)
    assert progress.cancelled and not (tmp_path / "small.engine").exists()
    again = build(small_graph(tmp_path))  # the builder is in good order
    assert any(layer.is_fused_attention for layer in again.layers)


@pytest.mark.usefixtures("eager_reports")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_what_a_report_raises_gets_out(tmp_path: Path, build: Callable[..., BuiltEngine], error: BaseException) -> None:
    """`mmdit-export … 2>&1 | head`: nobody reads any more, which is no fault of the graph."""

    def report(*_: object) -> None:
        raise error

    with pytest.raises(type(error)):
        build(small_graph(tmp_path), progress=BuildProgress(report))
    assert not (tmp_path / "small.engine").exists()


def test_a_disk_that_fills_up_while_the_log_is_written(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    class Full(BuildLog):
        def _write(self, line: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        Full(tmp_path / "build.log", lambda _: None) as log,
        pytest.raises(MachineError, match="on the disk") as caught,
    ):
        build(small_graph(tmp_path), log=log)
    assert caught.value.received == "No space left on device while writing"
    assert not (tmp_path / "small.engine").exists()


def test_a_warning_that_nobody_reads_ends_the_build(tmp_path: Path, build: Callable[..., BuiltEngine]) -> None:
    def gone(line: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with BuildLog(tmp_path / "build.log", gone) as log, pytest.raises(BrokenPipeError):
        build(small_graph(tmp_path, "float"), log=log)  # which TensorRT-RTX says something about
    assert not (tmp_path / "small.engine").exists()


def test_whatever_goes_wrong_with_the_file_gets_out(
    tmp_path: Path, build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what the disk says."""

    def put(self: hashed_file.HashedFile, data: bytes) -> None:
        raise ValueError("write to closed file")

    monkeypatch.setattr(hashed_file.HashedFile, "put", put)
    with pytest.raises(ValueError, match="write to closed file"):
        build(small_graph(tmp_path))
    assert not (tmp_path / "small.engine").exists()
