"""What an export makes of a model in one piece, or of its two parts: graphs on the disk, and TensorRT engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from mmdit_deploy.build import EngineRecord, Target
from mmdit_deploy.build.engines import build_target
from mmdit_deploy.bundle import graph_file
from mmdit_deploy.contract import Contract
from mmdit_deploy.export.request import ExportRequest
from mmdit_deploy.graph.census import implied_lowered
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.graph.split import SplitGraphs, split_graphs
from mmdit_deploy.model import calls
from mmdit_deploy.model.partition import partition
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.weights import planned_call_bytes

CONDITIONING, TRUNK = "conditioning", "trunk"  # also the names of their graphs
Log = Callable[[str], None]


@dataclass
class BuiltEngines:
    """TensorRT engines of an export, by target.

    Args:
        records: of the models, or of their trunks.
        conditioning: of the other part, where models are in two.
        hashes: size and SHA-256 of the engine files, by path in the bundle.
    """

    records: dict[str, EngineRecord] = field(default_factory=dict)
    conditioning: dict[str, EngineRecord] = field(default_factory=dict)
    hashes: dict[str, tuple[int, str]] = field(default_factory=dict)


def write_parts(
    request: ExportRequest,
    contract: Contract,
    standard: onnx.ModelProto,
    dialects: Iterable[str],
    folder: Path,
    plan: PrecisionPlan,
) -> SplitGraphs:
    """Cut a model in two, and write the graphs of both parts.

    Args:
        standard: the whole graph.
        dialects: that are shipped.

    Raises:
        GraphError: the parts together are not the whole.
    """
    spec = request.spec
    expected = {dialect: implied_lowered(spec, dialect, plan) for dialect in dialects}
    split = split_graphs(standard, calls(spec, request.outputs), contract, expected, folder)
    for dialect in expected:
        onnx.save(split.conditioning[dialect], folder / graph_file(dialect, CONDITIONING))
        onnx.save(split.trunk[dialect], folder / graph_file(dialect, TRUNK))
    return split


def build_engines(
    request: ExportRequest,
    contract: Contract,
    graphs: Graphs,
    split: SplitGraphs | None,
    targets: Sequence[Target],
    segments: Mapping[str, int],
    folder: Path,
    plan: PrecisionPlan,
    log: Log,
) -> BuiltEngines:
    """Build the TensorRT engines of all targets.

    Args:
        segments: by target, how many engines the model, or its trunk, is cut into.

    Raises:
        MMDiTError: as `build_target`.
    """
    spec, built = request.spec, BuiltEngines()
    chain, weights = calls(spec), planned_call_bytes(spec, plan)
    trunk = [call for call in chain if split is None or call.path not in split.calls]
    whole = contract if split is None else split.contract.trunk
    table = None if split is None else split.table

    def build(target: Target, own: Contract, runs: Sequence[Sequence[str]], part: str = "") -> EngineRecord:
        record, files = build_target(
            target, spec, request.precision, own, graphs.standard, folder, runs, log, plan, table=table, part=part
        )
        built.hashes |= files
        return record

    for target in targets:
        if target.flavour is None:
            continue
        runs = partition(trunk, weights, segments[target.name])
        built.records[target.name] = build(target, whole, runs)
        if split is not None:
            runs = (split.calls,)
            built.conditioning[target.name] = build(target, split.contract.conditioning, runs, CONDITIONING)
    return built
