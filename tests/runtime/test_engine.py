"""A bundle as a callable."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.errors import BundleError, ContractError, MachineError, MissingPackageError, MMDiTError, UsageError
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import Engine, engine_graph, runnable_target
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.metrics import compare


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, "ort-cpu")


def inputs(
    engine: Engine, batch: int = 2, rows: int = 3, cols: int = 5, txt_tokens: int = 4
) -> dict[str, Tensor]:
    sizes = {"batch": batch, "img_tokens": rows * cols, "txt_tokens": txt_tokens}
    values = {
        t.name: random_tensor(8, t.name, t.shape(sizes), std=1.0, dtype=getattr(torch, t.dtype))
        for t in engine.contract.inputs
    }
    return {**values, "timestep": torch.linspace(1000, 0, batch), "img_ids": grid_ids(rows, cols)}


@pytest.mark.parametrize("sizes", [(2, 3, 5, 4), (1, 1, 1, 1), (8, 2, 9, 33), (1, 24, 24, 77)])
def test_it_computes_the_model(
    engine: Engine, tiny_spec: ModelSpec, eager_model: Callable[..., MMDiT], sizes: tuple[int, int, int, int]
) -> None:
    """One session for all sizes, within the tolerance of fp16."""
    feed = inputs(engine, *sizes)
    out = engine(feed)
    assert list(out) == ["sample"] and out["sample"].dtype == torch.float16
    with torch.inference_mode():
        expected = eager_model(tiny_spec, RandomWeights(0))(**{n: t.float() for n, t in feed.items()})
    errors = compare(out["sample"], expected)
    assert errors.rel_l2 <= 5e-3 and errors.cosine >= 0.9999


def test_inputs_are_not_written_to_and_views_work(engine: Engine) -> None:
    feed = inputs(engine)
    before = {name: tensor.clone() for name, tensor in feed.items()}
    expected = engine(feed)["sample"]
    for name, tensor in feed.items():
        assert torch.equal(tensor, before[name])
    strided = {n: torch.stack([t, t], dim=-1)[..., 0] for n, t in feed.items()}
    assert not strided["hidden_states"].is_contiguous()
    assert torch.equal(engine(strided)["sample"], expected)


def test_runs_repeat_to_the_bit(engine: Engine) -> None:
    first = engine(inputs(engine))["sample"]
    engine(inputs(engine, rows=6))
    assert torch.equal(engine(inputs(engine))["sample"], first)


def test_a_wrong_input_never_reaches_the_runtime(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the runtime saw it")

    monkeypatch.setattr("mmdit_deploy.runtime.engine.run_session", never)
    feed = inputs(engine)
    short = {n: t for n, t in feed.items() if n != "timestep"}
    for broken, words in (
        (short, "missing ['timestep']"),
        ({**feed, "hidden_states": feed["hidden_states"].float()}, "hidden_states is float16"),
        ({**feed, "timestep": feed["timestep"].double()}, "timestep is float32"),
        ({**feed, "timestep": feed["timestep"][:1]}, "batch is one size"),
        ({**feed, "img_ids": grid_ids(3, 4)}, "img_tokens is one size"),
        (inputs(engine, batch=9), "batch must be 1 to 8"),
        (inputs(engine, rows=65, cols=64), "img_tokens must be 1 to 4096"),
        (inputs(engine, txt_tokens=257), "txt_tokens must be 1 to 256"),
    ):
        with pytest.raises(ContractError) as caught:
            engine(broken)
        assert words in str(caught.value)


def test_auto_takes_what_runs_here(tiny_bundle: Path, engine: Engine) -> None:
    assert runnable_target(engine.bundle) == "ort-cpu"
    assert Engine.load(tiny_bundle).target == "ort-cpu"


def test_an_engine_that_the_bundle_lacks(tiny_bundle: Path) -> None:
    with pytest.raises(MachineError) as caught:
        Engine.load(tiny_bundle, "ort-cuda")
    assert "ort-cpu" in caught.value.rule and caught.value.received == "ort-cuda"
    assert "--target ort-cuda" in str(caught.value.fix)
    for name in ("tpu", "rtx:sm89", ""):
        with pytest.raises(UsageError, match="an engine is one of ort-cpu"):
            Engine.load(tiny_bundle, name)


def with_engines(*targets: str) -> Any:
    """What is asked of a bundle about its engines."""
    engines = {target: {"graph": f"{target}.onnx"} for target in targets}
    return SimpleNamespace(name="tiny", manifest=SimpleNamespace(fields={"engines": engines}), file=Path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this a machine with these providers of ONNX Runtime, and a GPU or not."""

    def become(*providers: str, gpu: bool = False) -> None:
        names = [f"{name}ExecutionProvider" for name in providers]
        installed = SimpleNamespace(get_available_providers=lambda: names)
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", installed if providers else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return become


@pytest.mark.parametrize(
    ("providers", "gpu", "engines", "chosen"),
    [
        (["CUDA", "CPU"], True, ["ort-cpu", "ort-cuda"], "ort-cuda"),
        (["CPU"], True, ["ort-cuda", "ort-cpu"], "ort-cpu"),  # a GPU, and the onnxruntime without it
        (["CUDA", "CPU"], False, ["ort-cuda", "ort-cpu"], "ort-cpu"),  # onnxruntime-gpu, and no GPU
        (["CUDA", "CPU"], True, ["ort-cpu"], "ort-cpu"),
    ],
)
def test_auto_takes_a_gpu_where_all_of_it_is_there(
    machine: Callable[..., None], providers: list[str], gpu: bool, engines: list[str], chosen: str
) -> None:
    machine(*providers, gpu=gpu)
    assert runnable_target(with_engines(*engines)) == chosen


def test_auto_where_nothing_runs(machine: Callable[..., None]) -> None:
    machine("CPU", gpu=True)
    with pytest.raises(MachineError, match="--target ort-cpu") as caught:
        runnable_target(with_engines("ort-cuda"))
    assert "ort-cuda" in str(caught.value.received) and "CPUExecutionProvider" in str(caught.value.received)
    machine()
    for engine, extra in (("ort-cpu", "cpu"), ("ort-cuda", "gpu")):
        with pytest.raises(MissingPackageError, match=rf"mmdit-deploy\[{extra}\]"):
            runnable_target(with_engines(engine))


@pytest.mark.parametrize("ask", [runnable_target, lambda bundle: engine_graph(bundle, "ort-cpu")])
def test_a_bundle_of_graphs_alone(ask: Callable[[Any], object]) -> None:
    with pytest.raises(BundleError, match="--graph-only"):
        ask(with_engines())


@pytest.mark.parametrize(
    ("target", "error"), [("ort-cpu", None), ("ort-cuda", MachineError), ("trt", UsageError), ("tpu", UsageError)]
)
def test_the_graph_of_an_engine(target: str, error: type[MMDiTError] | None) -> None:
    bundle = with_engines("ort-cpu", "trt")  # of a later version, perhaps
    if error is None:
        assert engine_graph(bundle, target) == Path("ort-cpu.onnx")
        return
    with pytest.raises(error, match="ort-cpu"):
        engine_graph(bundle, target)


@pytest.mark.parametrize(
    ("target", "devices", "rule", "received", "fix"),
    [
        ("ort-cpu", {"timestep": "meta"}, "timestep is on the device that ort-cpu runs on: cpu", "meta", 'to("cpu")'),
        ("ort-cuda", {"timestep": "cpu"}, "timestep is on the device that ort-cuda runs on: cuda", "cpu", 'to("cuda")'),
        ("ort-cuda", {"img_ids": "cuda:1"}, "img_ids is on the device of", "cuda:1", 'img_ids.to("cuda:0")'),
    ],
)
def test_tensors_elsewhere_never_reach_the_runtime(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    devices: dict[str, str],
    rule: str,
    received: str,
    fix: str,
) -> None:
    monkeypatch.setattr("mmdit_deploy.runtime.engine.run_session", lambda *_: pytest.fail("the runtime saw it"))
    engine = copy.copy(engine)
    engine.target = target
    rest = "cuda:0" if target == "ort-cuda" else "cpu"
    feed: Any = {
        name: SimpleNamespace(dtype=t.dtype, shape=t.shape, device=torch.device(devices.get(name, rest)))
        for name, t in inputs(engine).items()
    }
    with pytest.raises(ContractError) as caught:
        engine(feed)
    assert rule in caught.value.rule and caught.value.received == received and fix in str(caught.value.fix)


def test_a_changed_byte_is_refused_before_anything_is_loaded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr("mmdit_deploy.runtime.engine.open_session", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        Engine.load(folder)
