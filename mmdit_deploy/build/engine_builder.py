"""Build one TensorRT engine from one graph, into a file, without ever holding the whole engine in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from mmdit_deploy.build.build_log import REPORT, BuildLog, trt_logger
from mmdit_deploy.build.flavours import Flavour
from mmdit_deploy.build.layers import EngineLayer, parse_inspector, parse_layer_list
from mmdit_deploy.build.progress import BuildProgress, run_cancellable, trt_monitor
from mmdit_deploy.build.timing_cache import TimingCache
from mmdit_deploy.contract import Profile, axis_range
from mmdit_deploy.errors import GraphError, MachineError
from mmdit_deploy.hashed_file import HashedFile, WrittenFile


@dataclass(frozen=True)
class BuiltEngine:
    """An engine file, and what is in it.

    Args:
        layers: every layer of the engine, as TensorRT lists them.
        activation_bytes: memory that running it takes besides weights, where TensorRT says it.
        seconds: that building took.
    """

    file: WrittenFile
    layers: tuple[EngineLayer, ...]
    activation_bytes: int | None
    seconds: float


def build_engine(
    flavour: Flavour,
    graph: onnx.ModelProto,
    weights_folder: Path,
    destination: Path,
    log: BuildLog,
    *,
    profiles: Sequence[Profile],
    capabilities: Sequence[str] = (),
    fused_attention: bool = True,
    progress: BuildProgress | None = None,
) -> BuiltEngine:
    """Build an engine.

    Args:
        graph: strongly typed; its inputs' symbolic axes are the profiles'.
        weights_folder: where the graph's external data lies.
        destination: the engine file; must not exist.
        log: open; gets the builder's messages.
        profiles: at least one.
        capabilities: target names of compute capabilities, e.g. ``("sm89",)``; empty for torch's current GPU.
        fused_attention: whether attention must be one kernel; else it is marked decomposable.
        progress: where the build is; cancels it.

    Raises:
        MissingPackageError: the flavour is not installed.
        GraphError: TensorRT cannot parse or build the graph; says what it said.
        MachineError: the flavour is too old, the disk is full, or memory ran out.
        KeyboardInterrupt: Ctrl-C; no file is left.
        CancelledError: `progress` was cancelled.
        BaseException: what `progress`'s report or `log`'s warning raised.
    """
    trt = flavour.load(f"building with {flavour.name}")
    progress = progress or BuildProgress(None)
    logger = trt_logger(trt, log, progress)
    start = time.perf_counter()
    with HashedFile(destination, _weight_bytes(graph)) as file:
        writer = _stream_writer(trt, file, progress)

        def work() -> tuple[bool, str]:
            builder = trt.Builder(logger)
            # A TensorRT 10 network is strongly typed by this flag; later ones always are.
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            _parse(trt, network, logger, graph, weights_folder)
            if not fused_attention:
                _allow_decomposition(trt, network)
            config = _config(trt, builder, flavour, capabilities)
            config.progress_monitor = trt_monitor(trt, progress)
            for profile in profiles:
                config.add_optimization_profile(_optimization_profile(builder, graph, profile))
            timings = TimingCache(flavour, config, log) if flavour.timing_cache else None
            built = bool(builder.build_serialized_network_to_stream(network, config, writer))
            if built and timings is not None:
                timings.save()
            return built, log.layers

        built, listed = run_cancellable(work, progress)
        if not built:
            raise _failure(flavour, graph, log)
    if flavour.layer_list == "inspector":
        layers = parse_inspector(run_cancellable(lambda: _inspect(trt, logger, destination, log), progress))
    else:
        layers = parse_layer_list(listed)
    return BuiltEngine(file.written, layers, log.activation_bytes, time.perf_counter() - start)


def _config(trt: Any, builder: Any, flavour: Flavour, capabilities: Sequence[str]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layer list names ONNX nodes
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: an fp32 engine would have fp16's 11 bits
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, sm in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), i)
    if flavour.hardware_compatibility is not None:
        level = getattr(trt.HardwareCompatibilityLevel, flavour.hardware_compatibility)
        config.hardware_compatibility_level = level
    return config


def _parse(trt: Any, network: Any, logger: Any, graph: onnx.ModelProto, weights_folder: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    # The path says where external data is; there need not be a file of that name.
    if not parser.parse(graph.SerializeToString(), os.fspath(weights_folder / "model.onnx")):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise GraphError(
            f"TensorRT's parser must understand the graph {graph.graph.name}",
            received="; ".join(map(_parser_error, errors))[:1500] or "it gave no reason",
            fix=REPORT,
        )


def _parser_error(error: Any) -> str:
    """Where and why: ``node_linear (Gemm) in blocks.3 (MMDiTJointBlock): …``."""
    where = [f"{error.node_name()} ({error.node_operator()})", *error.local_function_stack()]
    return f"{' in '.join(where)}: {error.desc()}" if error.node_operator() else str(error.desc())


def _allow_decomposition(trt: Any, network: Any) -> None:
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python API casts down
            layer.attention.decomposable = True


def _optimization_profile(builder: Any, graph: onnx.ModelProto, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for value in graph.graph.input:
        axes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        shapes = [
            tuple(getattr(axis_range(axis, profile), size) if isinstance(axis, str) else axis for axis in axes)
            for size in ("min", "opt", "max")
        ]
        made.set_shape(value.name, *shapes)
    return made


def _stream_writer(trt: Any, file: HashedFile, progress: BuildProgress) -> Any:
    class _Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            written = 0  # where putting it fails; the builder fails then, too
            with progress.callback():
                file.put(data)
                written = len(data)
            return written

    return _Writer()


def _inspect(trt: Any, logger: Any, engine_file: Path, log: BuildLog) -> str:
    """The layer list of an engine on the disk; needs the GPU that it is for."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None:
        raise MachineError(
            "a built engine must load on this GPU",
            received=_said(log),
            fix="check the GPU's free memory and its driver (nvidia-smi)",
        )
    listed: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return listed


def _failure(flavour: Flavour, graph: onnx.ModelProto, log: BuildLog) -> GraphError | MachineError:
    said = _said(log)
    if "OutOfMemory" in said or "out of memory" in said.lower() or "bad_alloc" in said:
        return MachineError(
            f"{flavour.name} needs more memory to build {graph.graph.name}",
            received=said,
            fix="--segments with a larger number",
        )
    return GraphError(f"{flavour.name} must be able to build {graph.graph.name}", received=said, fix=REPORT)


def _said(log: BuildLog) -> str:
    return " ".join(log.errors).strip()[:1500] or "it gave no reason"


def _weight_bytes(graph: onnx.ModelProto) -> int:
    lengths = [int(e.value) for t in graph.graph.initializer for e in t.external_data if e.key == "length"]
    return sum(lengths)
