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


def test_a_provider_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MachineError) as caught:
        open_session(transposing("float"), "ort-cuda")
    assert "CUDAExecutionProvider" in caught.value.rule and "CPUExecutionProvider" in str(caught.value.received)
    assert "mmdit-deploy[gpu]" in str(caught.value.fix) and caught.value.exit_status == 3


@pytest.mark.parametrize(("target", "extra"), [("ort-cpu", "cpu"), ("ort-cuda", "gpu")])
def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, target: str, extra: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError) as caught:
        ort_module.import_onnxruntime(target)
    assert f"mmdit-deploy[{extra}]" in str(caught.value.fix) and caught.value.exit_status == 3


def test_outputs_may_be_given() -> None:
    session = open_session(transposing("float"), "ort-cpu")
    x, y = torch.arange(6.0).reshape(2, 3), torch.zeros(3, 2)
    out = run_session(session, {"x": x}, [("y", torch.float32, (3, 2)), ("z", torch.float32, (2, 3))], {"y": y})
    assert out["y"] is y and torch.equal(y, x.T) and torch.equal(out["z"], x)


# ---- the CUDA provider, on a fake of ONNX Runtime ----


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU, and an ONNX Runtime that puts nodes where `where` says."""
    state: Any = SimpleNamespace(where={"CUDAExecutionProvider": ["MatMul"]}, got="CUDAExecutionProvider", opened=[])

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    class Session:
        def __init__(self, source: object, options: Options, **arguments: Any):
            state.opened.append((options.entries, arguments))

        def get_providers(self) -> list[str]:
            return [state.got, "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            assert state.opened[-1][0]["session.record_ep_graph_assignment_info"] == "1"
            return [
                SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
                for name, ops in state.where.items()
            ]

    module = SimpleNamespace(
        __version__="1.31.1",
        SessionOptions=Options,
        InferenceSession=Session,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return state


def test_onnx_runtime_gets_no_chance_to_fall_back(cuda: Any) -> None:
    open_session(b"", "ort-cuda", device=torch.device("cuda:1"))
    entries, arguments = cuda.opened[0]
    assert arguments == {"providers": [("CUDAExecutionProvider", {"device_id": "1"})], "enable_fallback": 0}
    # It would refuse arithmetic on shapes too, which ONNX Runtime puts on the CPU on purpose.
    assert "session.disable_cpu_ep_fallback" not in entries
    cuda.got = "CPUExecutionProvider"
    with pytest.raises(MachineError, match="fell back to CPUExecutionProvider"):
        open_session(b"", "ort-cuda")


@pytest.mark.parametrize("ops", [[], ["Shape", "Concat", "Gather"], ["Sin", "Cos", "ReduceMax", "Div", "Cast"]])
def test_small_nodes_may_be_on_the_cpu(cuda: Any, ops: list[str]) -> None:
    cuda.where["CPUExecutionProvider"] = ops
    open_session(b"", "ort-cuda")


@pytest.mark.parametrize(
    ("ops", "shown"),
    [
        (["Shape", "MatMul"], "1 MatMul"),
        (["RMSNormalization"] * 8 + ["Attention", "RMSNormalization"], "1 Attention, 9 RMSNormalization"),
        (["MultiHeadAttention"], "1 MultiHeadAttention"),
        (["FusedMatMul", "Gemm", "LayerNormalization", "Gelu"], "1 FusedMatMul, 1 Gelu, 1 Gemm, 1 LayerNormalization"),
    ],
)
def test_the_model_is_not_computed_on_the_cpu_in_silence(cuda: Any, ops: list[str], shown: str) -> None:
    cuda.where["CPUExecutionProvider"] = ops
    with pytest.raises(MachineError) as caught:
        open_session(b"", "ort-cuda")
    assert f"for {shown}, and" in str(caught.value.received) and caught.value.exit_status == 3


def test_the_real_onnx_runtime_tells_where_nodes_go() -> None:
    """The names that the check goes by, and that functions are looked into."""
    import onnxruntime

    text = """<ir_version: 11, opset_import: ["": 23, "f": 1]>
        g (float[M,4] x, float[4,4] w) => (float[M,4] y) { y = f.Block(x, w) }
        <domain: "f", opset_import: ["": 23]> Block (a, b) => (c) { c = MatMul(a, b) }"""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        onnx.parser.parse_model(text).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.get_provider_graph_assignment_info()
    assert [(part.ep_name, [node.op_type for node in part.get_nodes()]) for part in found] == [
        ("CPUExecutionProvider", ["MatMul"])
    ]


def test_ort_cuda_without_a_gpu(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="needs an NVIDIA GPU"):
        open_session(b"", "ort-cuda")
    assert not cuda.opened
