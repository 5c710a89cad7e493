"""Loading, refusing and freeing TensorRT engines, on a fake of TensorRT (`fake_tensorrt`)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_deploy.build import RTX, EngineRecord
from mmdit_deploy.errors import BundleError, MachineError, UsageError
from mmdit_deploy.runtime import TensorRTEngine
from mmdit_deploy.runtime.loading import error_log

Build = Callable[..., tuple[EngineRecord, list[Path]]]
TARGETS = ("rtx:sm89", "trt")


@pytest.mark.parametrize("specialize", ["lazy", "eager", "none"])
def test_when_kernels_are_specialized(fake: Any, build: Build, specialize: str) -> None:
    TensorRTEngine(*build(), specialize=specialize)
    names = [c.dynamic_shapes_kernel_specialization_strategy.name for c in fake.configs]
    assert names == [specialize.upper()] * 3
    with pytest.raises(UsageError, match="lazy, eager, none"):
        TensorRTEngine(*build(), specialize="sometimes")


def test_tensorrt_has_nothing_to_specialize_or_to_cache(fake: Any, build: Build, tmp_path: Path) -> None:
    TensorRTEngine(*build("trt"), cache=tmp_path / "kernels", specialize="eager").close()
    assert {c.dynamic_shapes_kernel_specialization_strategy for c in fake.configs} == {None}
    assert not (tmp_path / "kernels").exists()


def test_an_engine_that_does_not_load(fake: Any, build: Build) -> None:
    fake.refuses = "load"
    with pytest.raises(MachineError, match="loads segment-0") as caught:
        TensorRTEngine(*build())
    assert caught.value.received == "magic tag" and "--target rtx:sm89 --force" in str(caught.value.fix)


@pytest.mark.parametrize("fails", ["context", "profile"])
def test_what_lacks_memory_fails_at_load(fake: Any, build: Build, fails: str) -> None:
    fake.refuses = fails
    with pytest.raises(MachineError, match="segment-0") as caught:
        TensorRTEngine(*build())
    assert caught.value.exit_status == 3 and caught.value.received == "out of something"


def test_activations_that_do_not_fit(fake: Any, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    record, files = build()
    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(MachineError, match="for activations") as caught:
        TensorRTEngine(record, files)
    assert caught.value.received == "CUDA out of memory. Tried to allocate 9 GiB"


def test_a_run_that_fails_says_what_tensorrt_said(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build())
    fake.refuses = "enqueue"
    with pytest.raises(MachineError, match=r"enqueues engines/rtx-sm89/segment-0\.engine") as caught:
        chain.run(engine, chain.feed())
    assert caught.value.received == "out of something"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["inputs"][0].update(name="latent"), "hidden_states"),
        (
            lambda c: c["outputs"][0].update(dtype="float32"),
            "h: ('OUTPUT', 'float32', 3), not ('OUTPUT', 'float1",
        ),
        (lambda c: c["outputs"][0].update(axes=["batch", 8]), "h: ('OUTPUT', 'float16', 2)"),
        (lambda c: c["outputs"].append({"name": "more", "axes": [1], "dtype": "float32"}), "more"),
        (lambda c: c["inputs"].append(c["outputs"].pop(0)), "h: ('INPUT'"),
        (lambda c: c["inputs"].append({"name": "host_sizes", "axes": [1], "dtype": "float32"}), "in the host's memory"),
    ],
)
def test_an_engine_with_other_tensors_than_recorded_is_refused(
    fake: Any, build: Build, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    """It would read and write memory that is not its own."""
    with pytest.raises(BundleError, match=r"segment-0\.engine has the tensors") as caught:
        TensorRTEngine(*build(change=lambda c: change(c) if c["name"] == "segment-0" else None))
    assert words in str(caught.value.received)
    assert not fake.contexts


def test_an_output_that_is_larger_than_its_memory_is_not_written(fake: Any, chain: Any, build: Build) -> None:
    def widen(content: dict[str, Any]) -> None:
        if content["name"] == "segment-1":
            content["outputs"][1]["axes"][2] = 800

    engine = TensorRTEngine(*build(change=widen))
    with pytest.raises(BundleError) as caught:
        chain.run(engine, chain.feed())
    assert caught.value.received == "g is [2, 9, 800], not [2, 9, 8]"
    assert fake.count("run segment-1") == 0


def test_a_shape_that_the_engine_was_not_built_for(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build(change=lambda c: c["profiles"][0].update(img_tokens=[2, 4, 8])))
    with pytest.raises(BundleError, match="export the bundle again") as caught:
        chain.run(engine, chain.feed(2, 9))
    assert caught.value.received == "hidden_states of shape [2, 9, 4] is refused"


# ---- the end ----


def test_what_was_closed_does_not_run(fake: Any, chain: Any, build: Build) -> None:
    engine = TensorRTEngine(*build())
    engine.close()
    engine.close()
    with pytest.raises(MachineError, match="it was closed"):
        chain.run(engine, chain.feed())


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_that_is_dropped_is_freed(
    fake: Any, chain: Any, build: Build, target: str, cuda_graphs: bool
) -> None:
    """Nothing that lives until the end of the process holds it."""
    record, files = build(target)
    before = fake.count("synchronize")
    engine = TensorRTEngine(record, files, cuda_graphs=cuda_graphs)
    chain.run(engine, chain.feed())
    waited = fake.count("synchronize")
    del engine
    gc.collect()
    assert fake.count("synchronize") == waited + 1 > before


def test_the_log_keeps_what_is_wrong(fake: Any) -> None:
    trt = RTX.load("a test")
    log, severity = error_log(trt), trt.ILogger.Severity
    for i in range(20):
        log.log(severity.ERROR, f"wrong {i}")
        log.log(severity.WARNING, "so what")
    assert log.last() == " | ".join(f"wrong {i}" for i in range(12, 20)) and log.last() == "it gave no reason"


# ---- the real module ----


def test_the_real_module_has_all_that_is_used(fake: Any) -> None:
    """A fake proves nothing about names: here TensorRT-RTX itself is asked, which needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    used = {
        "Runtime": "deserialize_cuda_engine engine_header_size get_engine_validity",
        "ICudaEngine": "create_execution_context create_runtime_config device_memory_size_v2 get_tensor_dtype "
        "get_tensor_location get_tensor_mode get_tensor_name get_tensor_shape num_io_tensors",
        "IRuntimeConfig": "create_runtime_cache cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy "
        "set_execution_context_allocation_strategy set_runtime_cache",
        "IRuntimeCache": "deserialize serialize",
        "IExecutionContext": "execute_async_v3 get_tensor_shape set_device_memory set_input_shape "
        "set_optimization_profile_async set_tensor_address",
        "ExecutionContextAllocationStrategy": "USER_MANAGED",
        "CudaGraphStrategy": "WHOLE_GRAPH_CAPTURE",
        "DynamicShapesKernelSpecializationStrategy": "LAZY EAGER NONE",
        "TensorLocation": "DEVICE",
        "TensorIOMode": "INPUT OUTPUT",
        "DataType": "FLOAT HALF BF16",
        "EngineValidity": "INVALID",
        "EngineInvalidityDiagnostics": "OLD_CUDA_DRIVER INSUFFICIENT_GPU_MEMORY CUDA_ERROR",
    }
    for name, members in used.items():
        missing = [m for m in members.split() if not hasattr(getattr(trt, name), m)]
        assert not missing, f"{name}: {missing}"
    assert trt.DataType.HALF.name == "HALF" and trt.TensorIOMode.INPUT.name == "INPUT"
    log = error_log(trt)
    assert trt.Runtime(log).deserialize_cuda_engine(memoryview(b"no engine" * 20)) is None
    assert "Serialization" in log.last()
