"""Engines of tiny models, built by TensorRT-RTX on the CPU: what tests need of them is the layer list."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.build import RTX, EngineRecord, parse_target
from mmdit_deploy.build.build_log import BuildLog
from mmdit_deploy.build.engine_builder import build_engine
from mmdit_deploy.build.engines import build_target
from mmdit_deploy.build.gate import check_fusion
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.build.layers_file import FILE_NAME as LAYERS_FILE
from mmdit_deploy.build.layers_file import read_layers
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract, Profile, Range
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.census import implied_by_call
from mmdit_deploy.model import calls
from mmdit_deploy.spec import PRECISIONS, ModelSpec

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
def build_layers(tensorrt_rtx: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[EngineLayer, ...]]:
    """Builds an engine for SM89 and returns its layers: ``build_layers(graph, folder, (RANGES,), decomposable=False)``.

    `decomposable` lets TensorRT write an attention out that it has no fused kernel for.
    """

    def build(
        graph: onnx.ModelProto, folder: Path, profiles: Sequence[Profile] = (RANGES,), *, decomposable: bool = False
    ) -> tuple[EngineLayer, ...]:
        made = tmp_path_factory.mktemp("built")
        with BuildLog(made / "build.log", lambda line: None) as log:
            log.begin("test")
            built = build_engine(
                RTX,
                graph,
                folder,
                made / "engine",
                log,
                profiles=profiles,
                capabilities=("sm89",),
                fused_attention=not decomposable,
            )
        return built.layers

    return build


@pytest.fixture(scope="session")
def build_family(
    tensorrt_rtx: Any,
    tiny_families: Mapping[str, ModelSpec],
    saved_graph: Callable[[ModelSpec, str], tuple[onnx.ModelProto, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[EngineRecord, tuple[EngineLayer, ...]]]:
    """Builds a tiny family's engine for SM89 as an export does, gate and all: ``build_family("flux1", "fp16")``.

    Gives the record, and the layers as they are in ``layers.json``.
    """

    def build(family: str, precision: str = "fp16") -> tuple[EngineRecord, tuple[EngineLayer, ...]]:
        spec, compute = tiny_families[family], PRECISIONS[precision]
        graph, weights = saved_graph(spec, precision)
        folder = tmp_path_factory.mktemp(family)
        shutil.copy(weights / "weights.safetensors", folder)
        contract, whole = Contract.of(spec, compute, RANGES), [[call.path for call in calls(spec)]]
        target = parse_target("rtx:sm89")
        build_target(target, spec, compute, contract, graph, folder, whole, lambda line: None)
        record, (file,) = read_layers(folder / target.folder / LAYERS_FILE)
        return record, file.layers

    return build


@pytest.fixture
def refusal() -> Callable[..., str]:
    """What the gate says of an engine that it must refuse: ``refusal(graph, layers, spec, fused=True, profiles=1)``."""

    def refuse(graph: onnx.ModelProto, layers: Iterable[EngineLayer], spec: ModelSpec, **options: object) -> str:
        given = {"fused": True, "profiles": 1, "what": "engines/rtx-sm89", **options}
        with pytest.raises(GraphError) as caught:
            check_fusion(graph, tuple(layers), implied_by_call(spec), **given)
        assert caught.value.exit_status == 3
        return str(caught.value)

    return refuse


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder
