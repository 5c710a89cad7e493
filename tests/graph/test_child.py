"""Files that nobody vouches for are worked on in a process of its own: whatever happens there, the caller survives."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from mmdit_deploy.cli.optimize import main
from mmdit_deploy.errors import GraphError, MachineError, UsageError
from mmdit_deploy.graph import child
from mmdit_deploy.graph.child import ChildError, in_child
from mmdit_deploy.graph.optimize import optimize_file

HERE = Path(__file__).parent


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function of `child_work` in a child."""
    monkeypatch.syspath_prepend(str(HERE))
    return lambda name, request=None: in_child(f"child_work:{name}", {"value": request})


def test_an_answer_comes_back_whatever_is_printed(act: Any) -> None:
    got = act("answer", {"a": ["ü", 1, None]})
    assert got["got"] == {"a": ["ü", 1, None]} and got["pid"] != os.getpid()


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("segfault", UsageError, "SIGSEGV"),
        ("abort", UsageError, "SIGABRT"),
        ("abort_without_memory", MachineError, "allocation"),
        ("killed", MachineError, "memory"),
        ("terminated", MachineError, "SIGTERM"),
        ("exits", ChildError, "status 7"),
        ("too_deep", UsageError, "nested"),
        ("refuses", UsageError, "what helps"),
        ("fails", GraphError, "the pass failed"),
        ("disk_full", OSError, "No space left"),
        ("no_memory", MemoryError, "9 TB"),
        ("bug", ChildError, "KeyError: 'a bug'"),
    ],
)
def test_what_goes_wrong_there_is_an_error_here(name: str, error: type[Exception], words: str, act: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        act(name)
    assert type(caught.value) is error
    if error is OSError:
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == "out.onnx"


def test_what_lies_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any
) -> None:
    for name in ("json", "sys", "onnx", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert act("answer", 1)["got"] == 1


def child_of(process: psutil.Process) -> psutil.Process:
    """Its child, once that is there and listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for found in process.children():
            if found.num_threads() > 1:
                return found
        time.sleep(0.01)
    raise AssertionError("there is no child")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with interrupts ignored, and so this process may be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_child(act: Any) -> None:
    own = psutil.Process()
    seen: list[psutil.Process] = []

    def interrupt() -> None:
        seen.append(child_of(own))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        act("waits")
    thread.join()
    assert seen and not any(process.is_running() for process in seen)


def test_a_child_does_not_outlive_a_caller_that_was_killed() -> None:
    code = "from mmdit_deploy.graph.child import in_child; in_child('child_work:waits', {})"
    tree = [str(Path(child.__file__).parents[2]), str(HERE)]
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(tree)})
    process = child_of(psutil.Process(caller.pid))
    caller.kill()
    caller.wait()
    process.wait(timeout=60)


def test_a_crash_is_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(relu().SerializeToString())
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(
        "mmdit_deploy.graph.optimize.in_child",
        lambda _, request: in_child("child_work:write_and_crash", request),
    )
    assert main([str(source), str(target)]) == 2
    assert "SIGSEGV" in capsys.readouterr().err and os.listdir(tmp_path) == ["in.onnx"]


def relu() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def deep_functions(depth: int) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mine", 1)]
    functions = [helper.make_function("mine", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)]
    for i in range(1, depth):
        call = helper.make_node(f"F{i - 1}", ["a"], ["b"], domain="mine")
        functions.append(helper.make_function("mine", f"F{i}", ["a"], ["b"], [call], opsets))
    model = relu()
    model.graph.node[0].op_type, model.graph.node[0].domain = f"F{depth - 1}", "mine"
    model.opset_import.extend(opsets[1:])
    model.functions.extend(functions)
    return model


def test_3000_functions_deep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(deep_functions(3000).SerializeToString())
    assert main([str(source), str(target), "--json"]) == 2
    out, err = capsys.readouterr()
    assert "3000 deep" in err and json.loads(out)["exit_status"] == 2 and not target.exists()


GB = 1 << 30
SIDE = 8192


def test_weights_of_more_than_2_gb_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve weights of 256 MB each in a file of 3 GB that takes no place: the child never holds a tenth of one."""
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(large(12).SerializeToString())
    with (tmp_path / "weights.bin").open("xb") as file:
        file.truncate(3 * GB)
    monkeypatch.syspath_prepend(str(HERE))
    peaks: list[int] = []

    def measured(_: str, request: dict[str, Any]) -> Any:
        peaks.append(in_child("child_work:peak", {}))
        answer = in_child("child_work:work_and_peak", request)
        peaks.append(answer.pop("peak"))
        return answer

    monkeypatch.setattr("mmdit_deploy.graph.optimize.in_child", measured)
    done = optimize_file(source, target, "ort")
    assert done.files[0].changed and done.after["com.microsoft.MultiHeadAttention"] == 1
    assert peaks[1] - peaks[0] < 64 << 20, peaks
    made = onnx.load(target, load_external_data=False).graph.initializer
    references = [{e.key: e.value for e in tensor.external_data} for tensor in made]
    assert {r["location"] for r in references} == {"weights.bin"}
    assert sorted(int(r["offset"]) for r in references) == [i * GB // 4 for i in range(12)]
    assert target.stat().st_size < 100_000 and (tmp_path / "weights.bin").stat().st_blocks == 0


def large(weights: int) -> onnx.ModelProto:
    """x · w0 · w1 …, and attention over the result."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, "tokens", SIDE]) for n in "xy")
    nodes = [helper.make_node("MatMul", [f"v{i}" if i else "x", f"w{i}"], [f"v{i + 1}"]) for i in range(weights)]
    last = f"v{weights}"
    nodes.append(helper.make_node("Attention", [last] * 3, ["y"], q_num_heads=64, kv_num_heads=64))
    initializers = []
    for i in range(weights):
        tensor = onnx.TensorProto(name=f"w{i}", dims=[SIDE, SIDE], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", i * GB // 4), ("length", GB // 4)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    graph = helper.make_graph(nodes, "large", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
