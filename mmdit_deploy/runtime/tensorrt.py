"""TensorRT and TensorRT-RTX engines over torch tensors: the tensors' own memory, on the caller's stream.

A model that was cut into segments runs as one. All segments and profiles share one workspace for activations, so calls
take turns.

TensorRT-RTX compiles kernels when an execution context is made, and again for each new shape: in the background, with
slower kernels until they are done (``lazy``, its default), before that shape's first run (``eager``), or never
(``none``).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.build import EngineRecord, SegmentRecord, parse_target
from mmdit_deploy.contract import Profile
from mmdit_deploy.errors import ContractError, MachineError, UsageError
from mmdit_deploy.runtime.chain import Chain, Context
from mmdit_deploy.runtime.cuda_graphs import GraphedCall, capture
from mmdit_deploy.runtime.fit import check_header, check_runs_here, gpu, rebuild_command
from mmdit_deploy.runtime.loading import deserialize, error_log
from mmdit_deploy.runtime.runtime_cache import RuntimeCache
from mmdit_deploy.runtime.streams import WorkStream

SPECIALIZE = ("lazy", "eager", "none")
# Each holds a copy of all tensors of its shape; TensorRT's execution contexts of its own as well.
MAX_GRAPHS = 8
# "The pointer must have at least 256-byte alignment" (NvInferRuntime.h, setTensorAddress). torch's allocations have,
# views of them need not.
ALIGNMENT = 256


class TensorRTEngine:
    """The engine files of one target, loaded on one GPU. Calls from several threads take turns.

    Args:
        record: what was built.
        files: of its segments, in order; whoever names them vouches for their bytes.
        device: the GPU; by default torch's current one.
        cuda_graphs: launch each of the last `MAX_GRAPHS` shapes as a CUDA graph, over tensors of its own that calls
            copy into and out of. TensorRT's are captured here, TensorRT-RTX captures its own.
        cache: the file of TensorRT-RTX's runtime cache: read now, and written when there are new kernels.
        specialize: when TensorRT-RTX compiles kernels for a new shape: ``lazy``, ``eager`` or ``none``.

    Raises:
        UsageError: `specialize` is something else.
        MissingPackageError: TensorRT is not installed.
        MachineError: the engine does not fit this GPU or the installed version (nothing was deserialized), does not
            load, or needs more memory than there is.
        BundleError: an engine's tensors are not those of the record.
    """

    def __init__(
        self,
        record: EngineRecord,
        files: Sequence[Path],
        device: torch.device | None = None,
        *,
        cuda_graphs: bool = False,
        cache: Path | None = None,
        specialize: str = "lazy",
    ):
        if specialize not in SPECIALIZE:
            raise UsageError(
                f"kernels are specialized {', '.join(SPECIALIZE)}", received=repr(specialize), fix="name one of them"
            )
        target = parse_target(record.target)
        check_runs_here(record, target, device)
        assert target.flavour is not None  # checked above
        self.record = record
        self._device = gpu(device)
        self._trt = target.flavour.load(f"the target {target.name}")
        self._compiles, self._specialize = target.flavour.runtime_cache, specialize
        self._graphs_wanted = cuda_graphs
        # Where the runtime swaps kernels as it goes, it alone knows what can be captured, and when.
        self._captures_itself = hasattr(self._trt, "CudaGraphStrategy")
        self._lock = threading.Lock()
        self._held = _Held(self._device)
        # At the end of the process too: kernels that were compiled in the background are kept then.
        self._finalizer = weakref.finalize(self, self._held.release)
        with torch.cuda.device(self._device):
            self._log = error_log(self._trt)  # TensorRT needs it as long as anything that it made
            self._runtime = self._trt.Runtime(self._log)
            rebuild = f"{rebuild_command(target.flavour, self._device)} --force"
            for file in files:
                check_header(self._trt, self._runtime, file, target, rebuild)
            for segment, file in zip(record.segments, files, strict=True):
                engine = deserialize(self._trt, self._runtime, self._log, segment, file, rebuild)
                self._held.segments.append(_Segment(segment, engine, self._configure(engine, cache)))
            self._held.workspace = self._allocate_workspace()
            self._stream = WorkStream(self._device)
            # What cannot run for lack of memory fails here, and not at the first call.
            with self._stream.working() as stream:
                self._chain(0, stream)

    @property
    def device(self) -> torch.device:
        """The GPU, with its index."""
        return self._device

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Enqueue one run on torch's current stream of the device. The host does not wait for it.

        Args:
            inputs: by name, of the contract's dtypes and shapes, on the device. They are never written to.
            outputs: tensors to write to, by name.
            sizes: of each symbolic axis.

        Raises:
            ContractError: no profile holds the sizes.
            MachineError: the engine was closed, or TensorRT could not enqueue it.
        """
        profile = choose_profile(self.record.profiles, sizes)
        with self._lock:
            if not self._finalizer.alive:
                raise MachineError(
                    f"the engine {self.record.target} is loaded", received="it was closed", fix="load it"
                )
            with torch.no_grad(), torch.cuda.device(self._device), self._stream.working() as stream:
                if self._graphs_wanted:
                    self._graphed(profile, sizes, inputs, stream).run(inputs, outputs)
                    return
                aligned = {name: _at_address(tensor) for name, tensor in (*inputs.items(), *outputs.items())}
                self._chain(profile, stream).enqueue(aligned, sizes, stream)
                for name, tensor in outputs.items():
                    if aligned[name] is not tensor:
                        tensor.copy_(aligned[name])

    def close(self) -> None:
        """Wait for what still runs, keep new kernels, and free all memory. It cannot be run again."""
        with self._lock:
            self._finalizer()

    def _configure(self, engine: Any, cache: Path | None) -> Any:
        """How its execution contexts are made."""
        trt = self._trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._compiles:
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, self._specialize.upper())
            if self._held.runtime_cache is None:
                self._held.runtime_cache = RuntimeCache(config.create_runtime_cache(), cache)
            config.set_runtime_cache(self._held.runtime_cache.cache)
        if self._graphs_wanted and self._captures_itself:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _allocate_workspace(self) -> Tensor:
        nbytes = max(segment.engine.device_memory_size_v2 for segment in self._held.segments)
        try:
            return torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"the engine {self.record.target} needs {nbytes / 1e9:.2f} GB of the GPU's memory for activations",
                received=str(error).splitlines()[0],
                fix="free some, or export with smaller maxima (--batch, --img-tokens)",
            ) from error

    def _chain(self, profile: int, stream: torch.cuda.Stream) -> Chain:
        """The chain that plain calls of a profile run."""
        held = self._held
        if profile not in held.chains:
            held.chains[profile] = self._make_chain(profile, stream)
            if held.runtime_cache is not None:
                held.runtime_cache.save()  # most are compiled when a context is made; a killed process keeps these
        return held.chains[profile]

    def _make_chain(self, profile: int, stream: torch.cuda.Stream) -> Chain:
        held = self._held
        assert held.workspace is not None
        failed = partial(_failed, self.record.flavour, self._log)
        contexts = []
        for segment in held.segments:
            execution = segment.engine.create_execution_context(segment.config)
            if execution is None:
                raise failed(f"makes an execution context of {segment.record.file}")
            execution.set_device_memory(held.workspace.data_ptr(), held.workspace.nbytes)
            try:
                execution.set_optimization_profile_async(profile, stream.cuda_stream)
            except RuntimeError as error:  # the binding says nothing else of it, and never returns False
                raise failed(f"selects profile {profile} of {segment.record.file}") from error
            contexts.append(Context(segment.record, execution))
        return Chain(contexts, self._device, failed)

    def _graphed(
        self, profile: int, sizes: Mapping[str, int], inputs: Mapping[str, Tensor], stream: torch.cuda.Stream
    ) -> GraphedCall:
        """The call of this shape; the one that was used longest ago makes room for it."""
        graphs = self._held.graphs
        key = tuple(sorted(sizes.items()))  # which decide the profile
        if key in graphs:
            graphs.move_to_end(key)
            return graphs[key]
        if len(graphs) >= MAX_GRAPHS:
            torch.cuda.synchronize(self._device)  # it may still run
            graphs.popitem(last=False)
        # "Modifying the context from which the graph was captured will result in undefined behavior" (NVIDIA,
        # "CUDA Graphs" in TensorRT's best practices): a captured graph has contexts of its own.
        chain = self._chain(profile, stream) if self._captures_itself else self._make_chain(profile, stream)
        tensors = chain.tensors(sizes)
        replay: Callable[[], None]
        if self._captures_itself:
            replay = partial(_enqueue_here, chain, tensors, dict(sizes), self._device)
        else:
            for name, tensor in inputs.items():
                tensors[name].copy_(tensor)
            # New shapes are worked into the context by its first run, which no graph can hold (ibid.).
            chain.enqueue(tensors, sizes, stream)
            enqueue = partial(chain.enqueue, tensors, dict(sizes))
            replay = capture(enqueue, self._stream.own, self._device, self.record.target)
        graphs[key] = GraphedCall(tensors, replay, chain)
        return graphs[key]


def choose_profile(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """The first profile whose ranges hold all sizes: whoever wrote them down put the preferred one first.

    Args:
        sizes: of each symbolic axis that the inputs have.

    Returns:
        Its index.

    Raises:
        ContractError: none does; names the sizes, the axes that do not fit by profile, and the fix.
    """
    misfits = []
    for index, profile in enumerate(profiles):
        outside = [axis for axis, size in sizes.items() if not profile[axis].min <= size <= profile[axis].max]
        if not outside:
            return index
        misfits.append(f"{' and '.join(outside)} of {','.join(f'{axis}={r}' for axis, r in profile.items())}")
    wanted = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    raise ContractError(
        "all sizes of a call lie within one profile of the engine",
        received=f"{wanted}, outside {'; '.join(misfits)}",
        fix=f"export with --profile {wanted}, or with ranges around it",
    )


@dataclass(frozen=True)
class _Segment:
    """One engine file, deserialized."""

    record: SegmentRecord
    engine: Any
    config: Any


@dataclass
class _Held:
    """All that an engine holds on its GPU, to be freed in the right order, whoever frees it."""

    device: torch.device
    segments: list[_Segment] = field(default_factory=list)
    workspace: Tensor | None = None
    chains: dict[int, Chain] = field(default_factory=dict)
    graphs: OrderedDict[object, GraphedCall] = field(default_factory=OrderedDict)
    runtime_cache: RuntimeCache | None = None

    def release(self) -> None:
        """What was made of something goes before it; a context that outlives the runtime cache ends the process."""
        torch.cuda.synchronize(self.device)
        if self.runtime_cache is not None:
            self.runtime_cache.save()
        self.graphs.clear()
        self.chains.clear()
        self.segments.clear()
        self.runtime_cache = self.workspace = None


def _enqueue_here(chain: Chain, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], device: torch.device) -> None:
    chain.enqueue(tensors, sizes, torch.cuda.current_stream(device))


def _at_address(tensor: Tensor) -> Tensor:
    """The tensor itself where TensorRT can take its address, else a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _failed(flavour: str, log: Any, what: str) -> MachineError:
    return MachineError(
        f"{flavour} {what}", received=log.last(), fix="check the GPU's free memory and its driver (nvidia-smi)"
    )
