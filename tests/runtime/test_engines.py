"""Which of a bundle's engines runs here, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdit_deploy.errors import BundleError, MachineError, MissingPackageError, MMDiTError, UsageError
from mmdit_deploy.runtime import Engine, engine_files, engine_graph, fit, runnable_target


def with_engines(*targets: str) -> Any:
    """What is asked of a bundle about its engines."""
    engines = {target: {"graph": f"{target}.onnx"} for target in targets}
    return SimpleNamespace(name="tiny", split=None, manifest=SimpleNamespace(fields={"engines": engines}), file=Path)


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
    assert "on cuda" not in caught.value.rule and "device" not in str(caught.value)
    assert "ort-cuda" in str(caught.value.received) and "CPUExecutionProvider" in str(caught.value.received)
    machine()
    for engine, extra in (("ort-cpu", "cpu"), ("ort-cuda", "gpu")):
        with pytest.raises(MissingPackageError, match=rf"mmdit-deploy\[{extra}\]"):
            runnable_target(with_engines(engine))


def test_auto_runs_on_the_device_that_was_asked_for(machine: Callable[..., None]) -> None:
    machine("CUDA", "CPU", gpu=True)
    bundle = with_engines("ort-cuda", "ort-cpu")
    for device, chosen in ((None, "ort-cuda"), ("cuda:1", "ort-cuda"), ("cpu", "ort-cpu"), ("cpu:0", "ort-cpu")):
        assert runnable_target(bundle, device) == chosen
        assert runnable_target(bundle, None if device is None else torch.device(device)) == chosen


def test_auto_where_nothing_runs_on_the_device(machine: Callable[..., None]) -> None:
    machine("CUDA", "CPU", gpu=True)
    for engine, device, remedies in (
        ("ort-cuda", "cpu", ["name no device", "mmdit-export … --target ort-cpu"]),
        ("ort-cpu", "cuda:1", ["name no device"]),
    ):
        with pytest.raises(
            MachineError, match=f"that this machine can run on {device}, and tiny has {engine}"
        ) as caught:
            runnable_target(with_engines(engine), device)
        assert caught.value.received == f"{engine}: the device {device}"
        assert str(caught.value.fix).split("; or: ") == remedies


def test_auto_says_each_remedy_once(
    fake: Any, bundled: Callable[..., Any], build: Callable[..., Any], machine: Callable[..., None]
) -> None:
    machine("CUDA", gpu=False)
    bundle = bundled({"rtx:sm89": build()[0], "trt": build("trt")[0], "ort-cuda": None})
    with pytest.raises(MachineError) as caught:
        runnable_target(bundle)
    remedies = ["run it on a machine with such a GPU, and a torch with CUDA", "mmdit-export … --target ort-cpu"]
    assert str(caught.value.fix).split("; or: ") == remedies
    machine("CPU", gpu=True)
    fake.gpu = (8, 6)
    with pytest.raises(MachineError) as caught:
        runnable_target(bundled({"rtx:sm89": build()[0], "rtx:sm120": build("rtx:sm120", capabilities=("12.0",))[0]}))
    assert caught.value.fix == "mmdit-export … --target rtx:sm86; or: mmdit-export … --target ort-cpu"


@pytest.mark.parametrize("ask", [runnable_target, lambda bundle: engine_graph(bundle, "ort-cpu")])
def test_a_bundle_of_graphs_alone(ask: Callable[[Any], object]) -> None:
    with pytest.raises(BundleError, match="--graph-only"):
        ask(with_engines())


@pytest.mark.parametrize(
    ("target", "error"),
    [("ort-cpu", None), ("ort-cuda", MachineError), ("rtx:sm89", MachineError), ("tpu", UsageError)],
)
def test_the_graph_of_an_engine(target: str, error: type[MMDiTError] | None) -> None:
    bundle = with_engines("ort-cpu", "trt")
    if error is None:
        assert engine_graph(bundle, target) == Path("ort-cpu.onnx")
        return
    with pytest.raises(error, match="ort-cpu"):
        engine_graph(bundle, target)


def test_a_target_has_one_name(bundled: Callable[..., Any], build: Callable[..., Any]) -> None:
    record, files = build("rtx:sm86+sm89", capabilities=("8.6", "8.9"))
    bundle = bundled({"rtx:sm86+sm89": record})
    assert engine_files(bundle, "rtx:sm89+sm86") == (record, files)
    assert engine_graph(bundle, "rtx:sm89+sm86").name == "model.onnx"


def test_engine_files_are_tensorrts(bundled: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"ort-cpu, which runs ort-cpu\.onnx"):
        engine_files(bundled({"ort-cpu": None}), "ort-cpu")


def _drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda entry: entry.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *[(_drop(key), f"no {key}") for key in ("flavour", "version", "capabilities", "profiles", "segments")],
        (lambda e: e.update(segments=[]), "adds up to 0"),
        (lambda e: e.update(segments=["x"]), "segments[0]: 'x'"),
        (lambda e: e.update(profiles=[]), "no profile"),
        (lambda e: e["profiles"][0].pop("batch"), "a profile without a range for each axis"),
        (lambda e: e["profiles"][0].update(batch=[1]), "profiles[0].'batch': [1]"),
        (lambda e: e.update(flavour="TensorRT"), "an engine of TensorRT"),
        (lambda e: e["segments"].pop(0), "adds up to"),
        (lambda e: e["segments"].reverse(), "reads g"),
        (lambda e: e["segments"][-1]["outputs"][0].update(name="other"), "no segment writes sample"),
        (lambda e: e["segments"][1]["inputs"][0].update(dtype="float32"), "reads h"),
        (lambda e: e["segments"][1]["outputs"][0].update(name="timestep"), "writes timestep again"),
    ],
)
def test_a_record_that_is_none_is_a_broken_bundle(
    fake: Any,
    bundled: Callable[..., Any],
    build: Callable[..., Any],
    change: Callable[[dict[str, Any]], object],
    words: str,
) -> None:
    bundle = bundled({"rtx:sm89": build()[0]})
    change(bundle.manifest.fields["engines"]["rtx:sm89"])
    for ask in (lambda: Engine(bundle, "rtx:sm89"), lambda: engine_files(bundle, "rtx:sm89")):
        with pytest.raises(BundleError, match=r"the manifest of tiny|the segments of rtx:sm89 are a chain") as caught:
            ask()
        assert words in str(caught.value.received)
    assert not fake.events


def test_auto_prefers_a_tensorrt_that_fits(
    fake: Any, bundled: Callable[..., Any], build: Callable[..., Any], machine: Callable[..., None]
) -> None:
    engines = {"ort-cpu": None, "ort-cuda": None, "rtx:sm89": build()[0], "trt": build("trt")[0]}
    bundle = bundled(engines)
    machine("CUDA", "CPU", gpu=True)
    assert runnable_target(bundle) == "rtx:sm89"
    assert runnable_target(bundled(dict(reversed(engines.items())))) == "trt"  # the bundle's order among equals
    fake.gpu = (12, 0)
    assert runnable_target(bundle) == "ort-cuda"
    machine("CPU", gpu=True)
    assert runnable_target(bundle) == "ort-cpu"
    machine("CPU", gpu=False)
    assert runnable_target(bundle) == "ort-cpu"
    assert not fake.events


def test_auto_asks_about_the_gpu_that_it_is_given(
    fake: Any,
    bundled: Callable[..., Any],
    build: Callable[..., Any],
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two GPUs of different kinds in one machine."""
    machine("CUDA", "CPU", gpu=True)
    monkeypatch.setattr(fit, "gpu", lambda device: torch.device("cuda:0") if device is None else device)
    capabilities = {"cuda:0": (8, 9), "cuda:1": (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    engines = {"rtx:sm89": build()[0], "rtx:sm120": build("rtx:sm120", capabilities=("12.0",))[0], "ort-cpu": None}
    bundle = bundled(engines)
    for device, chosen in ((None, "rtx:sm89"), ("cuda:0", "rtx:sm89"), ("cuda:1", "rtx:sm120"), ("cpu", "ort-cpu")):
        assert runnable_target(bundle, device) == chosen
    monkeypatch.setattr("mmdit_deploy.runtime.engine.open_bundle", lambda path, verify: bundle)
    taken: list[tuple[str, Any]] = []
    monkeypatch.setattr(Engine, "__init__", lambda self, b, target, *, device, **_: taken.append((target, device)))
    Engine.load("tiny", device="cuda:1")
    assert taken == [("rtx:sm120", "cuda:1")]


def test_a_tensorrt_engine_where_there_is_no_gpu(
    bundled: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before torch is asked which GPU it would be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("there is none"))
    for target in ("rtx:sm89", "trt"):
        with pytest.raises(MachineError, match="needs an NVIDIA GPU"):
            Engine(bundled({target: build(target)[0]}), target)


def test_auto_where_no_tensorrt_fits(
    fake: Any, bundled: Callable[..., Any], build: Callable[..., Any], machine: Callable[..., None]
) -> None:
    """Without onnxruntime: a bundle of TensorRT engines does not need it."""
    machine(gpu=True)
    bundle = bundled({"rtx:sm89": build()[0]})
    assert runnable_target(bundle) == "rtx:sm89"
    fake.gpu = (8, 6)
    with pytest.raises(MachineError, match="--target rtx:sm86") as caught:
        runnable_target(bundle)
    assert "8.6" in str(caught.value.received) and "--target ort-cpu" in str(caught.value.fix)
    with pytest.raises(MachineError, match=r"which has 8\.6"):  # by name: never another
        Engine(bundle, "rtx:sm89")


def test_a_target_of_a_later_version_is_left_alone(machine: Callable[..., None]) -> None:
    machine("CPU")
    assert runnable_target(with_engines("rtx:sm999", "ort-cpu")) == "ort-cpu"
