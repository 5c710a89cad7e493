"""A TensorRT and a GPU that are not there.

The fake runtime reads and writes the addresses that it is given, so that a wrong one, a tensor that was freed too early
or a shape that was not set gives wrong numbers or an error, as the real one would. What it computes is `fake_segment`.
Work on a stream is done at once; what is done while a stream is captured is done when the graph is launched.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.build import RTX
from mmdit_deploy.runtime.tensorrt import _Held

VERSION = "1.7.1.116"
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def fake_segment(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """What a fake engine computes: of a sample, every output depends on every input, on its name, and on the place."""
    means = [t.double().flatten(1).mean(1) if t.dim() > 1 else t.double() for _, t in sorted(inputs.items())]
    total = sum(mean * (1 + len(name)) for name, mean in zip(sorted(inputs), means, strict=True))
    for name, tensor in outputs.items():
        place = torch.arange(tensor[0].numel(), dtype=torch.float64) / tensor[0].numel()
        tensor.copy_((place + total[:, None] / 8 + len(name) / 16).reshape(tensor.shape))


def aligned(value: Tensor) -> Tensor:
    """A copy at a multiple of 256 bytes, as torch allocates on a GPU."""
    room = torch.empty(value.nbytes + 256, dtype=torch.uint8)
    start = -room.data_ptr() % 256
    copy = room[start : start + value.nbytes].view(value.dtype).view(value.shape)
    return copy.copy_(value)


@dataclasses.dataclass
class Fake:
    """What the fakes did, in order, and how they are told to behave."""

    events: list[str] = dataclasses.field(default_factory=list)
    addresses: list[dict[str, int]] = dataclasses.field(default_factory=list)  # by execution
    capturing: list[Callable[[], None]] | None = None
    loaded: list[str] = dataclasses.field(default_factory=list)
    contexts: list[Any] = dataclasses.field(default_factory=list)
    configs: list[Any] = dataclasses.field(default_factory=list)
    refuses: str | None = None  # what fails: "load", "context", "profile", "enqueue"
    diagnosis: int = 0
    gpu: tuple[int, int] = (8, 9)
    current: Any = None
    compiled: bytes = b"kernels"
    there: bool = True

    def count(self, event: str) -> int:
        return sum(e.startswith(event) for e in self.events)


class _Enum:
    def __init__(self, **members: int):
        self.__members__ = {name: SimpleNamespace(name=name, value=value) for name, value in members.items()}
        vars(self).update(self.__members__)


def _view(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(address)
    with torch.inference_mode(False):  # a runtime knows no such mode
        return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def make_module(fake: Fake, *, rtx: bool) -> Any:
    """A module with the part of TensorRT's API that is used."""
    trt: Any = SimpleNamespace(__version__=VERSION)
    logger: Any = None
    trt.ExecutionContextAllocationStrategy = _Enum(STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2)
    trt.TensorLocation = _Enum(DEVICE=0, HOST=1)

    class ILogger:
        Severity = _Enum(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

        def __init__(self) -> None:
            self.initialized = True

    class Context:
        def __init__(self, engine: Any, config: Any):
            self.engine, self.config, self.profile = engine, config, 0
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.at: dict[str, int] = {}
            self.memory = 0

        def set_device_memory(self, memory: int, size: int) -> None:
            assert memory and size >= self.engine.device_memory_size_v2
            self.memory = memory

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self.profile, self.shapes = index, {}
            fake.events.append(f"profile {index} of {self.engine.name} on {stream}")
            if fake.refuses == "profile":  # what the binding does of a False (pyCore.cpp)
                logger.log(ILogger.Severity.ERROR, "out of something")
                raise RuntimeError("Error in set optimization profile async.")
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            fake.events.append(f"shape {name}")
            self.shapes[name] = shape
            return all(
                low <= size <= high
                for size, (low, high) in zip(shape, self.engine.bounds(name, self.profile), strict=True)
            )

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            sizes = {
                axis: size
                for read, shape in self.shapes.items()
                for axis, size in zip(self.engine.tensors[read][1], shape, strict=True)
                if isinstance(axis, str)
            }
            return tuple(sizes.get(a, -1) if isinstance(a, str) else a for a in self.engine.tensors[name][1])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.at[name] = memory
            return name in self.engine.tensors

        def execute_async_v3(self, stream_handle: int) -> bool:
            fake.events.append(f"run {self.engine.name} on {stream_handle}")
            fake.addresses.append(dict(self.at))
            if fake.refuses == "enqueue":
                logger.log(ILogger.Severity.ERROR, "out of something")
                return False
            assert self.memory and set(self.at) == set(self.engine.tensors)
            values = {
                name: _view(self.at[name], self.get_tensor_shape(name), dtype)
                for name, (_, _, dtype) in self.engine.tensors.items()
            }
            reads = {n: v for n, v in values.items() if self.engine.tensors[n][0] == "INPUT"}
            writes = {n: v for n, v in values.items() if n not in reads}

            def work() -> None:
                fake_segment(reads, writes)

            if fake.capturing is None:
                work()
            else:
                fake.capturing.append(work)
            return True

    class Config:
        cuda_graph_strategy: Any = None
        dynamic_shapes_kernel_specialization_strategy: Any = None

        def __init__(self) -> None:
            self.cache: Any = None
            self.allocation: Any = None
            fake.configs.append(self)

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self.allocation = strategy

    class Cache:
        def __init__(self) -> None:
            self.content = b""

        def deserialize(self, blob: bytes) -> bool:
            fake.events.append("cache read")
            if not bytes(blob).startswith(b"kernels"):
                return False
            self.content = bytes(blob)
            return True

        def serialize(self) -> bytes:
            return self.content or fake.compiled

    class Engine:
        def __init__(self, content: Mapping[str, Any]):
            self.name = content["name"]
            self.device_memory_size_v2 = content["workspace"]
            self.profiles = content["profiles"]
            self.tensors = {
                t["name"]: (mode, t["axes"], getattr(torch, t["dtype"]))
                for mode, side in (("INPUT", "inputs"), ("OUTPUT", "outputs"))
                for t in content[side]
            }
            self.num_io_tensors = len(self.tensors)

        def bounds(self, name: str, profile: int) -> list[tuple[int, int]]:
            ranges = self.profiles[profile]
            return [(ranges[a][0], ranges[a][2]) if isinstance(a, str) else (a, a) for a in self.tensors[name][1]]

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return SimpleNamespace(name=self.tensors[name][0])

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name=NAMES[str(self.tensors[name][2]).removeprefix("torch.")])

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(-1 if isinstance(a, str) else a for a in self.tensors[name][1])

        def get_tensor_location(self, name: str) -> Any:
            return trt.TensorLocation.HOST if "host" in name else trt.TensorLocation.DEVICE

        def create_runtime_config(self) -> Any:
            return Config()

        def create_execution_context(self, config: Any) -> Any:
            fake.events.append(f"context of {self.name}")
            if fake.refuses == "context":
                logger.log(ILogger.Severity.ERROR, "out of something")
                return None
            fake.contexts.append(Context(self, config))
            return fake.contexts[-1]

    class Runtime:
        def __init__(self, given: Any):
            nonlocal logger
            assert given.initialized
            logger = given

        def deserialize_cuda_engine(self, content: Any) -> Any:
            blob = bytes(memoryview(content))
            fake.events.append("load")
            if fake.refuses == "load":
                logger.log(ILogger.Severity.WARNING, "a warning")
                logger.log(ILogger.Severity.ERROR, "magic tag")
                return None
            fake.loaded.append(json.loads(blob)["name"])
            return Engine(json.loads(blob))

    trt.ILogger, trt.Runtime = ILogger, Runtime
    if rtx:
        trt.CudaGraphStrategy = _Enum(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)
        trt.DynamicShapesKernelSpecializationStrategy = _Enum(LAZY=0, EAGER=1, NONE=2)
        trt.EngineValidity = _Enum(VALID=0, SUBOPTIMAL=1, INVALID=2)
        trt.EngineInvalidityDiagnostics = _Enum(
            VERSION_MISMATCH=1, UNSUPPORTED_CC=2, OLD_CUDA_DRIVER=4, MALFORMED_ENGINE=32, CUDA_ERROR=64
        )
        Config.create_runtime_cache = lambda self: Cache()  # type: ignore[attr-defined]
        Config.set_runtime_cache = lambda self, cache: setattr(self, "cache", cache)  # type: ignore[attr-defined]
        Runtime.engine_header_size = 16  # type: ignore[attr-defined]

        def validity(self: Any, header: bytes) -> tuple[Any, int]:
            assert len(header) == 16
            fake.events.append("header")
            named = trt.EngineValidity
            return (named.INVALID if fake.diagnosis else named.VALID), fake.diagnosis

        Runtime.get_engine_validity = validity  # type: ignore[attr-defined]
    return trt


class FakeStream:
    """A stream, with a number for a handle."""

    handles = 100

    def __init__(self, device: Any = None, *, handle: int | None = None):
        FakeStream.handles += 1
        self.cuda_stream = FakeStream.handles if handle is None else handle
        self.device = torch.device("cpu")

    def wait_stream(self, other: FakeStream) -> None:
        STATE.events.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def wait_event(self, event: Any) -> None:
        STATE.events.append(f"{self.cuda_stream} waits for the call on {event.stream}")


class _Event:
    stream: int | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream.cuda_stream


class _Graph:
    def capture_begin(self, *, capture_error_mode: str) -> None:
        assert STATE.current.cuda_stream != 0
        STATE.events.append("capture")
        STATE.capturing = []

    def capture_end(self) -> None:
        self.work, STATE.capturing = STATE.capturing or [], None

    def replay(self) -> None:
        STATE.events.append("replay")
        for work in self.work:
            work()


STATE = Fake()


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    before, STATE.current = STATE.current, stream
    try:
        yield
    finally:
        STATE.current = before


@contextmanager
def fake_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A machine with an RTX 4090 and both TensorRTs. Its memory is the CPU's; torch's current stream is the default."""
    global STATE
    state = STATE = Fake(current=FakeStream(handle=0))
    modules = {True: make_module(state, rtx=True), False: make_module(state, rtx=False)}
    # Tensors on the CPU lie at multiples of 64 bytes only.
    monkeypatch.setattr("mmdit_deploy.runtime.tensorrt.ALIGNMENT", 64)
    flavour = type(RTX)
    monkeypatch.setattr(flavour, "load", lambda self, purpose: modules[self is RTX])
    monkeypatch.setattr(flavour, "version", lambda self: VERSION)
    for place in ("engine", "fit", "tensorrt"):
        monkeypatch.setattr(f"mmdit_deploy.runtime.{place}.gpu", lambda device: torch.device("cpu"))
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: state.gpu,
        "get_device_name": lambda device=None: "NVIDIA GeForce RTX 4090",
        "device": lambda device: _on(state.current),
        "current_stream": lambda device=None: state.current,
        "stream": _on,
        "Stream": FakeStream,
        "Event": _Event,
        "CUDAGraph": _Graph,
        "synchronize": lambda device=None: state.events.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def release(held: Any) -> None:
        if state.there:  # an engine may be dropped after the test, and the GPU is gone
            real(held)

    real = _Held.release
    monkeypatch.setattr(_Held, "release", release)
    yield state
    state.there = False
