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

from fake_tensorrt import FakeStream
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.errors import BundleError, ContractError, MachineError, UsageError
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import Engine, runnable_target
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.metrics import compare
from random_inputs import random_inputs


def inputs(engine: Engine, batch: int = 2, rows: int = 3, cols: int = 5, txt_tokens: int = 4) -> dict[str, Tensor]:
    sizes = {"batch": batch, "img_tokens": rows * cols, "txt_tokens": txt_tokens}
    values = random_inputs(engine.contract, sizes)
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


class Elsewhere(Tensor):
    """A tensor without memory, of whichever device."""

    @staticmethod
    def on(device: str, like: Tensor) -> Tensor:
        made: Tensor = Tensor._make_wrapper_subclass(Elsewhere, like.shape, dtype=like.dtype, device=device)
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise AssertionError(f"{function} was called")


def test_tensors_elsewhere_never_reach_the_runtime(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything moved: who mixes devices pays a copy in every call, and is told."""
    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", lambda *_: pytest.fail("the runtime saw it"))
    feed = inputs(engine)
    for device in ("meta", "cuda:1"):
        with pytest.raises(ContractError) as caught:
            engine({**feed, "timestep": Elsewhere.on(device, feed["timestep"])})
        assert caught.value.rule == "timestep is on the device that this ort-cpu engine runs on: cpu"
        assert caught.value.received == device and 'timestep, device="cpu"' in str(caught.value.fix)


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


# ---- TensorRT engines of a bundle, on a fake of TensorRT ----


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
    engine, stream, feed = Engine(bundled({"rtx:sm89": build()[0]}), "rtx:sm89"), FakeStream(), chain.feed()
    engine(feed, stream=stream)
    ran = [event for event in fake.events if event.startswith("run")]
    assert ran == [f"run segment-{i} on {stream.cuda_stream}" for i in range(3)]
    # The caller may drop its inputs at once: their memory waits for the stream.
    assert [id(tensor) for tensor in held] == [id(tensor) for tensor in feed.values()]


def test_arguments_go_through(fake: Any, bundled: Callable[..., Any], build: Callable[..., Any]) -> None:
    Engine(bundled({"rtx:sm89": build()[0]}), "rtx:sm89", cuda_graphs=True, specialize="eager")
    assert {c.cuda_graph_strategy.name for c in fake.configs} == {"WHOLE_GRAPH_CAPTURE"}
    assert {c.dynamic_shapes_kernel_specialization_strategy.name for c in fake.configs} == {"EAGER"}


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
