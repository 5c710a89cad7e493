"""What tests of several stages share: tiny models, their graphs, and a tiny bundle."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import pytest
import torch

from mmdit_deploy.calibration.graph_values import fused_functions
from mmdit_deploy.calibration.trajectory import calibrate_trajectory, default_samples
from mmdit_deploy.checkpoint import write_safetensors
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import (
    RandomWeights,
    WeightSource,
    read_parameter,
    stream_parts,
    weights_layout,
)
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.eager.program import Program
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.export.planning import plan_precision
from mmdit_deploy.graph.pipeline import Graphs, build_graphs
from mmdit_deploy.model import MMDiT, calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.weights import planned_layout, stream_planned
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify import EngineUnderTest, Verdict, verify_against_weights
from tiny_models import TINY, TINY_FAMILIES
from traces import Traces

# Every axis from one up: parity is shown at the ends of what is possible, not of what is usual.
WIDE_RANGES = {"batch": Range(1, 2, 8), "img_tokens": Range(1, 64, 4096), "txt_tokens": Range(1, 16, 256)}
_GRAPHS: dict[object, Graphs] = {}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def traces(run_folder: Path) -> Traces:
    """The traces of this run."""
    folder = run_folder / "traces"
    folder.mkdir(exist_ok=True)
    return Traces(folder)


@pytest.fixture(scope="session")
def bench_module() -> Callable[[str], ModuleType]:
    """Imports a file of bench/ by its name, as a script beside it would."""
    bench = str(Path(__file__).parents[1] / "bench")

    def load(name: str) -> ModuleType:
        sys.path.insert(0, bench)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(bench)

    return load


@pytest.fixture(scope="session")
def digits(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    """`bench/digits_model.py`: a small text-to-image model with learned weights, sampled and judged."""
    pytest.importorskip("sklearn")
    return bench_module("digits_model")


@pytest.fixture(scope="session")
def tiny_spec() -> ModelSpec:
    """Two joint blocks of width 64 with QK norm."""
    return TINY


@pytest.fixture(scope="session")
def tiny_families() -> Mapping[str, ModelSpec]:
    """A tiny model of each family but plain SD3, by name."""
    return TINY_FAMILIES


@pytest.fixture(scope="session", params=TINY_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each of the tiny families in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def programs_for(traces: Traces) -> Callable[..., Mapping[str, Program]]:
    """The programs of a model's kinds, exported once: ``programs_for(spec, dtype=torch.float32)``."""

    def programs(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Mapping[str, Program]:
        return traces.programs(spec, calls(spec), dtype)

    return programs


@pytest.fixture(scope="session")
def fused_for(traces: Traces) -> Callable[..., Mapping[str, ir.Function]]:
    """The fused fp16 functions of a model's kinds, of exports made once a session: ``fused_for(spec, *names)``.

    All of them where no name is given. They are shared: clone one before changing it.
    """
    made: dict[object, Mapping[str, ir.Function]] = {}

    def fused(spec: ModelSpec, *names: str) -> Mapping[str, ir.Function]:
        if (spec, names) not in made:
            with traces.within(spec):
                wanted = [call for call in calls(spec) if not names or call.kind.function in names]
                made[spec, names] = fused_functions(wanted, torch.float16)
        return made[spec, names]

    return fused


@pytest.fixture(scope="session")
def graphs_of(traces: Traces) -> Callable[..., Graphs]:
    """Builds a model's graphs through the whole pipeline, tracing no function twice in a session.

    ``graphs_of(spec, precision="fp32", dialects=("ort",), outputs=())``; what it returns is shared: copy a
    graph before changing it.
    """

    def build(
        spec: ModelSpec,
        precision: str = "fp32",
        dialects: Sequence[str] = ("ort",),
        outputs: Sequence[str] = (),
    ) -> Graphs:
        key = (spec, precision, tuple(dialects), tuple(outputs))
        if key not in _GRAPHS:
            compute = PRECISIONS[precision]
            layout = weights_layout(spec, getattr(torch, compute.dtype), {"format": "pt"})
            contract = Contract.of(spec, compute, WIDE_RANGES, outputs=outputs)
            with traces.within(spec):
                _GRAPHS[key] = build_graphs(spec, contract, compute, layout, dialects=dialects, outputs=outputs)
        return _GRAPHS[key]

    return build


@pytest.fixture(scope="session")
def planned_graphs(traces: Traces) -> Callable[..., Graphs]:
    """A model's graphs with a precision plan: ``planned_graphs(spec, plan, dialects=())``, tracing nothing twice."""

    def build(spec: ModelSpec, plan: PrecisionPlan, dialects: Sequence[str] = ()) -> Graphs:
        contract = Contract.of(spec, plan.precision, WIDE_RANGES)
        layout = planned_layout(spec, plan, {"format": "pt"})
        with traces.within(spec):
            return build_graphs(spec, contract, plan.precision, layout, dialects=dialects, plan=plan)

    return build


@pytest.fixture(scope="session")
def save_planned() -> Callable[..., Path]:
    """Writes planned graphs and their weights side by side: ``save_planned(folder, spec, source, plan, graphs)``."""

    def save(folder: Path, spec: ModelSpec, source: WeightSource, plan: PrecisionPlan, graphs: Graphs) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(graphs.standard, folder / "model.onnx")
        for dialect, graph in graphs.lowered.items():
            onnx.save(graph, folder / f"model.{dialect}.onnx")
        layout = planned_layout(spec, plan, {"format": "pt"})
        write_safetensors(folder / "weights.safetensors", layout, stream_planned(spec, source, plan))
        return folder

    return save


@pytest.fixture
def room_for_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned and not made fits: a disk with 1 TB free, and 24 GiB of memory."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr("mmdit_deploy.preflight.estimates.available_memory", lambda: 24 * 2**30)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, of the size that the test's module names in ``SMALL_DISK``, e.g. ``2m``."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.module.SMALL_DISK}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def tensorrt_rtx() -> Any:
    """The module of TensorRT-RTX; tests that build engines are skipped where it is missing."""
    reason = "TensorRT-RTX is not installed: pip install 'mmdit-deploy[rtx]'"
    return pytest.importorskip("tensorrt_rtx", reason=reason, exc_type=ImportError)


@pytest.fixture(scope="session")
def traced_once(
    graphs_of: Callable[..., Graphs], traces: Traces
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A context in which exports of any model take what was traced already, and graphs that this session has built."""

    def build(
        spec: ModelSpec,
        contract: Contract,
        precision: Any,
        layout: Any,
        *,
        dialects: Sequence[str],
        outputs: Sequence[str] = (),
        plan: Any = None,
    ) -> Graphs:
        if plan is None or plan.plain:
            return graphs_of(spec, precision.name, dialects, outputs)
        with traces.within(spec):
            return build_graphs(spec, contract, precision, layout, dialects=dialects, outputs=outputs, plan=plan)

    def plan(request: ExportRequest, *arguments: Any) -> Any:
        with traces.within(request.spec):
            return plan_precision(request, *arguments)

    def verify(engine: EngineUnderTest, *arguments: Any, **options: Any) -> Verdict:
        with traces.within(engine.spec):
            return verify_against_weights(engine, *arguments, **options)

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with (
            mock.patch("mmdit_deploy.export.pipeline.plan_precision", plan),
            mock.patch("mmdit_deploy.export.pipeline.build_graphs", build),
            mock.patch("mmdit_deploy.export.pipeline.verify_against_weights", verify),
        ):
            yield

    return patched


@pytest.fixture(scope="session")
def save_graphs() -> Callable[..., Path]:
    """Writes graphs and their weights side by side, as a bundle has them.

    ``save_graphs(folder, spec, source, graphs, precision="fp32")``
    """

    def save(folder: Path, spec: ModelSpec, source: WeightSource, graphs: Graphs, precision: str = "fp32") -> Path:
        dtype = getattr(torch, PRECISIONS[precision].dtype)
        folder.mkdir(parents=True, exist_ok=True)
        files: Mapping[str, onnx.ModelProto] = {
            "model.onnx": graphs.standard,
            **{f"model.{dialect}.onnx": graph for dialect, graph in graphs.lowered.items()},
        }
        for name, graph in files.items():
            onnx.save(graph, folder / name)
        layout = weights_layout(spec, dtype, {"format": "pt"})
        write_safetensors(folder / "weights.safetensors", layout, stream_parts(spec, source, dtype))
        return folder

    return save


@pytest.fixture(scope="session")
def eager_model() -> Callable[[ModelSpec, WeightSource], MMDiT]:
    """Our eager model in fp32, with a source's weights."""

    def load(spec: ModelSpec, source: WeightSource) -> MMDiT:
        with torch.device("meta"):
            model = MMDiT(spec)
        state = {p.path: read_parameter(source, p, torch.float32) for p in parameters(spec)}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    return load


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, traces: Traces) -> Path:
    """An fp16 bundle for ort-cpu with random weights (seed 0), not verified; not to be changed."""
    out = tmp_path_factory.mktemp("bundles") / "tiny-fp16"
    request = ExportRequest(TINY, RandomWeights(0), PRECISIONS["fp16"], out=out, ranges=WIDE_RANGES, verify=False)
    with traces.within(TINY):
        export(request)
    return out


@pytest.fixture(scope="session")
def short_trajectories() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Within the block, exports calibrate on two steps of small images."""

    def short(spec: ModelSpec, *args: Any, **options: Any) -> Any:
        samples = default_samples(spec, sizes=((4, 5, 3), (6, 4, 5)), prompts=1)
        return calibrate_trajectory(spec, *args, **{**options, "samples": samples, "steps": 2})

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with mock.patch("mmdit_deploy.export.calibrated.calibrate_trajectory", short):
            yield

    return patched
