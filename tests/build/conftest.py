"""Engines of tiny models, built by TensorRT-RTX on the CPU: what tests need of them is the layer list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Profile, Range
from mmdit_deploy.spec import ModelSpec

# A minimum of one token changes the plan (one image token alone cannot even be built in bf16).
RANGES: Profile = {"batch": Range(1, 2, 8), "img_tokens": Range(4, 64, 1024), "txt_tokens": Range(2, 16, 256)}
ONE_SIZE: Profile = {"batch": Range(1, 1, 1), "img_tokens": Range(64, 64, 64), "txt_tokens": Range(16, 16, 16)}


@pytest.fixture(scope="session")
def profiles() -> Mapping[str, tuple[Profile, ...]]:
    """Sets of optimization profiles, by name."""
    return {"one": (RANGES,), "two": (RANGES, ONE_SIZE), "one size": (ONE_SIZE,)}


@pytest.fixture(scope="session")
def saved_graph(
    graphs_of: Callable[..., Any],
    save_graphs: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[ModelSpec, str], tuple[onnx.ModelProto, Path]]:
    """The standard graph of a model, and the folder with its weights: ``saved_graph(spec, "fp16")``.

    Both are shared: copy the graph before changing it.
    """
    folders: dict[tuple[ModelSpec, str], Path] = {}

    def save(spec: ModelSpec, precision: str) -> tuple[onnx.ModelProto, Path]:
        graphs = graphs_of(spec, precision)
        key = (spec, precision)
        if key not in folders:
            folder = tmp_path_factory.mktemp("engine")
            folders[key] = save_graphs(folder, spec, RandomWeights(0), graphs, precision)
        return graphs.standard, folders[key]

    return save


@pytest.fixture(scope="session")
def build_layers() -> Callable[..., str]:
    """Builds an engine for SM89 and returns the verbose message that lists its layers.

    ``build_layers(graph, folder, profiles=(RANGES,), decomposable=False)``; `decomposable` lets TensorRT write an
    attention out that it has no fused kernel for.
    """
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'mmdit-deploy[rtx]'", exc_type=ImportError
    )

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity, message))

    def build(
        graph: onnx.ModelProto, folder: Path, profiles: Sequence[Profile] = (RANGES,), *, decomposable: bool = False
    ) -> str:
        log = Log()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(graph.SerializeToString(), str(folder / "model.onnx")):
            raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
        for layer in (network.get_layer(i) for i in range(network.num_layers)):
            if decomposable and layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for ranges in profiles:
            profile = builder.create_optimization_profile()
            for tensor in graph.graph.input:
                axes = [dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
                shapes = (
                    tuple(getattr(ranges[axis], end) if isinstance(axis, str) else axis for axis in axes)
                    for end in ("min", "opt", "max")
                )
                profile.set_shape(tensor.name, *shapes)
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise RuntimeError("; ".join(m for severity, m in log.messages if severity <= trt.ILogger.ERROR))
        return "".join(message for _, message in log.messages if message.startswith("Layers:\n"))

    return build
