"""`mmdit-optimize` as it is: its work on the graph is done in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import psutil
import pytest
from onnx import TensorProto, helper


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An attention that ONNX Runtime has an op of its own for."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "tokens", 16]) for n in "xy")
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], q_num_heads=2, kv_num_heads=2)
    graph = helper.make_graph([node], "attention", [x], [y])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "in.onnx"
    )
    return tmp_path / "in.onnx"


def test_from_file_to_file(source: Path, tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    done = spawn("optimize", source, tmp_path / "out.onnx", "--dialect", "ort")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0 and err == ""
    assert "multi-head attention" in out
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["MultiHeadAttention"]
    assert sorted(os.listdir(tmp_path)) == ["in.onnx", "out.onnx"]


def test_a_broken_file(source: Path, tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    source.write_bytes(source.read_bytes()[:-40])
    done = spawn("optimize", source, tmp_path / "out.onnx")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and out == ""
    assert "whole ONNX model" in err and "Traceback" not in err and os.listdir(tmp_path) == ["in.onnx"]


def is_running(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_interrupted(source: Path, tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]) -> None:
    """Its child ends with it."""
    started = spawn("optimize", source, tmp_path / "out.onnx", "--dialect", "ort")
    assert started.stderr is not None
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while not (pids := children.read_text().split()):
        assert started.poll() is None
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=120)
    assert started.returncode == 130 and "interrupted" in err and "Traceback" not in err
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sorted(os.listdir(tmp_path)) == ["in.onnx"]
