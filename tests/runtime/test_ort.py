"""ONNX Runtime sessions over torch memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx.parser
import pytest
import torch

from mmdit_deploy.errors import MachineError, MissingPackageError
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.runtime import ort as ort_module

DTYPES = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def transposing(dtype: str) -> bytes:
    """A graph of two moves, which every type has: y = xᵀ, z = x."""
    text = f"""<ir_version: 11, opset_import: ["": 23]>
        g ({dtype}[M,N] x) => ({dtype}[N,M] y, {dtype}[M,N] z) {{ y = Transpose(x) z = Identity(x) }}"""
    return onnx.parser.parse_model(text).SerializeToString()


@pytest.mark.parametrize("name", DTYPES)
def test_values_pass_to_the_bit(name: str) -> None:
    session = open_session(transposing(name), "ort-cpu")
    dtype = DTYPES[name]
    x = (torch.arange(6.0).reshape(2, 3) / 7).to(dtype)
    out = run_session(session, {"x": x}, [("y", dtype, (3, 2)), ("z", dtype, (2, 3))])
    assert torch.equal(out["y"], x.T) and torch.equal(out["z"], x)
    assert list(out) == ["y", "z"] and out["y"].dtype == dtype


@pytest.mark.parametrize("name", DTYPES)
def test_views_work_and_inputs_are_not_written_to(name: str) -> None:
    session = open_session(transposing(name), "ort-cpu")
    dtype = DTYPES[name]
    whole = torch.arange(48.0).reshape(6, 8).to(dtype)
    before = whole.clone()
    view = whole.T[1:6:2, ::3]
    assert not view.is_contiguous()
    out = run_session(session, {"x": view}, [("y", dtype, (2, 3)), ("z", dtype, (3, 2))])
    assert torch.equal(out["y"], view.T) and torch.equal(out["z"], view)
    assert torch.equal(whole, before)


def test_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reads the tensor's own memory and writes into the tensor that is returned."""
    bound: dict[str, int] = {}

    class Binding:
        def bind_input(self, name: str, *args: Any) -> None:
            bound[name] = args[-1]

        bind_output = bind_input

        def synchronize_outputs(self) -> None:
            pass

    session = SimpleNamespace(io_binding=Binding, run_with_iobinding=lambda binding: None)
    x = torch.ones(2, 3)
    out = run_session(session, {"x": x}, [("y", torch.float32, (3, 2))])  # type: ignore[arg-type]
    assert bound == {"x": x.data_ptr(), "y": out["y"].data_ptr()}


def test_each_tensor_is_bound_where_it_is() -> None:
    """The runtime believes what it is told: an address of the CPU, called one of a GPU, ends the process."""
    bound: dict[str, str] = {}

    class Binding:
        def bind_input(self, name: str, device: str, *_: Any) -> None:
            bound[name] = device

        bind_output = bind_input

        def synchronize_outputs(self) -> None:
            pass

    session = SimpleNamespace(io_binding=Binding, run_with_iobinding=lambda binding: None)
    feed = {"x": torch.ones(2, device="meta"), "timestep": torch.ones(2)}
    run_session(session, feed, [("y", torch.float32, (2,))])  # type: ignore[arg-type]
    assert bound == {"x": "meta", "timestep": "cpu", "y": "meta"}


def test_two_runs_do_not_share_outputs() -> None:
    session = open_session(transposing("float"), "ort-cpu")
    outputs = [("y", torch.float32, (2, 2)), ("z", torch.float32, (2, 2))]
    first = run_session(session, {"x": torch.zeros(2, 2)}, outputs)
    run_session(session, {"x": torch.ones(2, 2)}, outputs)
    assert not first["y"].any()


def test_tensors_that_need_gradients_work() -> None:
    session = open_session(transposing("float"), "ort-cpu")
    x = torch.ones(2, 3, requires_grad=True)
    out = run_session(session, {"x": x}, [("y", torch.float32, (3, 2)), ("z", torch.float32, (2, 3))])
    assert not out["y"].requires_grad


def test_a_broken_graph_is_refused_without_the_runtimes_own_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    for graph in (path, path.read_bytes()):
        with pytest.raises(MachineError) as caught:
            open_session(graph, "ort-cpu")
        assert "could not load the graph" in caught.value.rule and caught.value.received and caught.value.fix


def test_a_provider_that_is_not_there_is_named() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this installation has the CUDA provider")
    with pytest.raises(MachineError) as caught:
        open_session(transposing("float"), "ort-cuda")
    assert "CUDAExecutionProvider" in caught.value.rule and "CPUExecutionProvider" in str(
        caught.value.received
    )
    assert "mmdit-deploy[gpu]" in str(caught.value.fix) and caught.value.exit_status == 3


@pytest.mark.parametrize(("target", "extra"), [("ort-cpu", "cpu"), ("ort-cuda", "gpu")])
def test_without_onnxruntime_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, target: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError) as caught:
        ort_module.import_onnxruntime(target)
    assert f"mmdit-deploy[{extra}]" in str(caught.value.fix) and caught.value.exit_status == 3
