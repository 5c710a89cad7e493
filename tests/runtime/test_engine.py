"""A bundle as a callable."""

from __future__ import annotations

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
from mmdit_deploy.runtime import Engine, engine_files, engine_graph, fit, runnable_target
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.metrics import compare


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle, "ort-cpu")


def inputs(engine: Engine, batch: int = 2, rows: int = 3, cols: int = 5, txt_tokens: int = 4) -> dict[str, Tensor]:
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
    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", lambda *_: pytest.fail("the runtime saw it"))
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
    for name in ("ort-cuda", "rtx:sm89", "trt"):
        with pytest.raises(MachineError) as caught:
            Engine.load(tiny_bundle, name)
        assert "ort-cpu" in caught.value.rule and caught.value.received == name
        assert f"--target {name}" in str(caught.value.fix) and caught.value.exit_status == 3
    for name in ("tpu", "rtx:sm90", ""):
        with pytest.raises(UsageError, match="--target"):
            Engine.load(tiny_bundle, name)


def test_outputs_may_be_given(engine: Engine) -> None:
    feed = inputs(engine)
    expected = engine(feed)["sample"]
    mine = torch.zeros_like(expected)
    assert engine(feed, outputs={"sample": mine})["sample"] is mine and torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda t: {"sample": t.float()}, "float32 [2, 15, 12]"),
        (lambda t: {"sample": t[:1]}, "float16 [1, 15, 12]"),
        (lambda t: {"sample": torch.stack([t, t], dim=-1)[..., 0]}, "float16 [2, 15, 12], not contiguous"),
        (lambda t: {"latent": t}, "latent"),
        (lambda t: {"sample": t.to("meta")}, "meta"),
    ],
)
def test_a_wrong_output_never_reaches_the_runtime(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], dict[str, Tensor]], received: str
) -> None:
    """It would be written to whatever it is."""
    feed = inputs(engine)
    outputs = change(engine(feed)["sample"])
    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", lambda *_: pytest.fail("the runtime saw it"))
    with pytest.raises(ContractError) as caught:
        engine(feed, outputs=outputs)
    assert caught.value.received == received


def test_a_stream_is_the_gpus(engine: Engine) -> None:
    stream: Any = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ContractError, match="the stream is one of the device"):
        engine(inputs(engine), stream=stream)


def test_arguments_that_are_not_for_the_target(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="ort-cpu runs on cpu"):
        Engine.load(tiny_bundle, "ort-cpu", device="cuda:1")
    with pytest.raises(UsageError, match="CUDA graphs are for TensorRT targets"):
        Engine.load(tiny_bundle, "ort-cpu", cuda_graphs=True)


def test_a_closed_engine_does_not_run(tiny_bundle: Path) -> None:
    with Engine.load(tiny_bundle) as engine:
        feed = inputs(engine)
        assert engine.device == torch.device("cpu") and engine(feed)["sample"].shape == (2, 15, 12)
    with pytest.raises(MachineError, match="it was closed"):
        engine(feed)


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


def test_tensors_elsewhere_never_reach_the_runtime(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", lambda *_: pytest.fail("the runtime saw it"))
    feed: dict[str, Any] = inputs(engine)
    for device in ("meta", "cuda:1"):
        moved = SimpleNamespace(
            dtype=torch.float32, shape=feed["timestep"].shape, device=torch.device(device), is_contiguous=lambda: True
        )
        with pytest.raises(ContractError) as caught:
            engine({**feed, "timestep": moved})
        assert caught.value.rule == "timestep is on the device that this ort-cpu engine runs on: cpu"
        assert caught.value.received == device and 'timestep.to("cpu")' in str(caught.value.fix)


def test_a_changed_byte_is_refused_before_anything_is_loaded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr("mmdit_deploy.runtime.ort.open_session", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        Engine.load(folder)


# ---- TensorRT engines of a bundle; conftest's fakes ----


def test_a_bundles_tensorrt_engine_as_a_callable(
    fake: Any, chain: Any, bundled: Callable[..., Any], build: Callable[..., Any], own_cache: Path
) -> None:
    feed = chain.feed()
    for target in ("rtx:sm89", "trt"):
        with Engine(bundled({target: build(target)[0]}), target) as engine:
            received = engine(feed)
            assert list(received) == ["sample", "blocks.0"]
            assert all(torch.equal(received[name], t) for name, t in chain.expected(feed).items())
    # Kernels that were compiled are kept where the next process looks, for the one that compiles any.
    assert len(list(own_cache.rglob("*.kernels"))) == 1


def test_a_stream_of_the_callers(
    fake: Any, chain: Any, bundled: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: held.append(self))
    engine, stream, feed = Engine(bundled({"rtx:sm89": build()[0]}), "rtx:sm89"), chain.stream(), chain.feed()
    engine(feed, stream=stream)
    ran = [event for event in fake.events if event.startswith("run")]
    assert ran == [f"run segment-{i} on {stream.cuda_stream}" for i in range(3)]
    # The caller may drop its inputs at once: their memory waits for the stream.
    assert [id(tensor) for tensor in held] == [id(tensor) for tensor in feed.values()]


def test_arguments_go_through(fake: Any, bundled: Callable[..., Any], build: Callable[..., Any]) -> None:
    Engine(bundled({"rtx:sm89": build()[0]}), "rtx:sm89", cuda_graphs=True, specialize="eager")
    assert {c.cuda_graph_strategy.name for c in fake.configs} == {"WHOLE_GRAPH_CAPTURE"}
    assert {c.dynamic_shapes_kernel_specialization_strategy.name for c in fake.configs} == {"EAGER"}


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


def test_whether_an_engine_runs_here_is_asked_once(
    fake: Any, bundled: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what deserializes it; `auto` asks besides, to choose."""
    asked: list[str] = []

    def ask(record: Any, target: Any, device: Any = None) -> None:
        asked.append(target.name)

    for place in ("engine", "engines", "tensorrt"):  # whichever of them asks
        monkeypatch.setattr(f"mmdit_deploy.runtime.{place}.check_runs_here", ask, raising=False)
    Engine(bundled({"rtx:sm89": build()[0]}), "rtx:sm89")
    assert asked == ["rtx:sm89"]


def test_a_tensorrt_engine_where_there_is_no_gpu(bundled: Callable[..., Any], build: Callable[..., Any]) -> None:
    """Said before torch is asked which GPU it would be."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
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
