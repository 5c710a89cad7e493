"""Verified tiny bundles, one per precision, and copies of them to break."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from faults import FAULTS
from mmdit_deploy.build import parse_target
from mmdit_deploy.bundle import open_bundle, read_manifest, write_manifest
from mmdit_deploy.calibration.bundle_plan import CALIBRATION
from mmdit_deploy.calibration.scales_file import read_scales
from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.export import ExportRequest, ExportResult, export
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import PRECISIONS, ModelSpec, Precision, precision
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import Case, EngineUnderTest, Verdict, verify_against_weights
from mmdit_deploy.verify.noise_floor import FloorRequest
from traces import Traces

SEED = 3
RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(1, 8, 16)}
# A wide and a square grid; a batch of two, so that timesteps differ within a batch.
CASES = (Case(2, 3, 5, 7, timestep=500.25), Case(1, 4, 4, 8, timestep=999.0))


@dataclass(frozen=True)
class Copy:
    """A bundle of one's own, to break."""

    path: Path
    traces: Traces

    @property
    def graph(self) -> Path:
        (path,) = self.path.glob("model.ort*.onnx")
        return path

    def engine(self, **changes: Any) -> EngineUnderTest:
        """Its engine, whatever the files have become."""
        fields = read_manifest(self.path).fields
        spec = ModelSpec.from_json(fields["spec"])
        contract = Contract.from_json(fields["contract"])
        compute = precision(fields["precision"], fields["base"])
        return EngineUnderTest(
            name=self.path.name,
            target=parse_target("ort-cpu"),
            spec=spec,
            contract=contract,
            precision=compute,
            graph=onnx.load(self.graph, load_external_data=False),
            folder=self.path,
            files=(self.graph,),
            plan=_plan(self.path, spec, compute),
            **changes,
        )

    def verify(self, cases: Sequence[Case] = CASES, *, noise_floor: FloorRequest = "none", **changes: Any) -> Verdict:
        """The verdict on its engine, against the model with the seed's weights."""
        engine = self.engine(**changes)
        with self.traces.within(engine.spec):
            (verdict,) = verify_against_weights(engine, RandomWeights(SEED), cases, noise_floor=noise_floor)
        return verdict

    def edit_graph(self, change: Callable[[onnx.ModelProto], None]) -> None:
        model = onnx.load(self.graph, load_external_data=False)
        before = model.SerializeToString()
        change(model)
        assert model.SerializeToString() != before
        onnx.save(model, self.graph)

    def edit_weights(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Change tensors by canonical key, in place: where each one lies stays the same."""
        path = self.path / "weights.safetensors"
        file = SafetensorsFile(path)
        tensors = {key: file.read(key).clone() for key in file.tensors}
        infos = dict(file.tensors)
        file.close()
        before = path.read_bytes()
        change(tensors)
        data = bytearray(before)
        for key, info in infos.items():
            raw = bytes(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy())
            assert len(raw) == info.nbytes
            data[info.offset : info.offset + info.nbytes] = raw
        assert data != before
        path.write_bytes(data)

    def seal(self) -> Path:
        """Make the manifest agree with the files again, as if the bundle had been written so."""
        fields = read_manifest(self.path).fields
        (self.path / "manifest.json").unlink()
        write_manifest(self.path, fields)
        open_bundle(self.path)
        return self.path


def _plan(folder: Path, spec: ModelSpec, compute: Precision) -> PrecisionPlan:
    """What is quantized in a bundle, whatever else its files have become."""
    if not compute.quantized:
        return PrecisionPlan(compute)
    scales = read_scales(folder / CALIBRATION, spec)
    return PrecisionPlan(compute, scales.linears, scales.attentions)


@pytest.fixture(scope="session")
def quick_export(
    traced_once: Callable[[], contextlib.AbstractContextManager[object]],
) -> Callable[..., ExportResult]:
    """`export`, with the graphs that the session has traced already."""

    def run(request: ExportRequest, log: Callable[[str], None] = lambda _: None) -> ExportResult:
        with traced_once():
            return export(request, log)

    return run


@pytest.fixture(scope="session")
def healthy(
    quick_export: Callable[..., Any],
    tiny_spec: ModelSpec,
    tiny_families: Mapping[str, ModelSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """A verified bundle by precision, and by family if it is not SD3's; not to be changed."""
    folder = tmp_path_factory.mktemp("healthy")
    specs = {"sd3": tiny_spec, **tiny_families}

    @functools.cache
    def bundle(name: str, family: str) -> Path:
        out = folder / f"{family}-{name}"
        request = ExportRequest(specs[family], RandomWeights(SEED), precision(name), out=out, ranges=RANGES)
        path: Path = quick_export(request).path
        return path

    return lambda name, family="sd3": bundle(name, family)


@pytest.fixture
def opened(traces: Traces) -> Callable[[Path], Copy]:
    """A bundle of one's own, from its folder."""
    return lambda path: Copy(path, traces)


@pytest.fixture
def copy_of(healthy: Callable[..., Path], opened: Callable[[Path], Copy], tmp_path: Path) -> Callable[..., Copy]:
    """A copy of the healthy bundle of a precision, and of a family, to break."""

    def copy(precision: str, family: str = "sd3") -> Copy:
        return opened(Path(shutil.copytree(healthy(precision, family), tmp_path / f"copy-{family}-{precision}")))

    return copy


@pytest.fixture
def plant() -> Callable[[Copy, str], str]:
    """Plant a fault by name; gives the call that is wrong first."""

    def apply(copy: Copy, name: str) -> str:
        fault = FAULTS[name]
        (copy.edit_graph if fault.in_graph else copy.edit_weights)(fault.change)
        return fault.first

    return apply


@pytest.fixture
def planted(copy_of: Callable[..., Copy], plant: Callable[[Copy, str], str]) -> Callable[[str, str], tuple[Copy, str]]:
    """A copy of a bundle of a fault's family with the fault in it, and the call that is wrong first."""

    def make(name: str, precision: str) -> tuple[Copy, str]:
        copy = copy_of(precision, FAULTS[name].family)
        return copy, plant(copy, name)

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize over precisions, and over the faults that can be told at each.

    Those of other families than SD3 are planted in bf16 in soak alone. Without the weights they are planted in one
    precision: what is told by then is the final output, as for SD3.
    """
    names = set(metafunc.fixturenames)
    replay = "replayed" in names
    if "fault" in names:
        pairs = [(f, p) for f, fault in FAULTS.items() for p in fault.tried(replay) if p not in fault.unseen(replay)]
        dear = {(f, "bf16") for f, fault in FAULTS.items() if fault.family != "sd3"}
        metafunc.parametrize(
            ("fault", "precision"), [pytest.param(*p, marks=pytest.mark.soak) if p in dear else p for p in pairs]
        )
    elif "precision" in names:
        metafunc.parametrize("precision", PRECISIONS)


@pytest.fixture
def replayed() -> Callable[[Copy], Verdict]:
    """The verdict on a sealed copy, against what was recorded at export."""
    return lambda copy: verify_bundle(copy.seal())


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two: the pools of PyTorch and ONNX Runtime would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
