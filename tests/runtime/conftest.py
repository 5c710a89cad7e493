"""A model of three segments for the fake TensorRT, its engine files and bundles; and bundles for ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_tensorrt import VERSION, Fake, aligned, fake_machine, fake_segment
from mmdit_deploy.build import RTX, TENSORRT, EngineRecord, SegmentRecord
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import TABLE, Contract, Profile, Range, SplitContract, TensorSpec
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.runtime import Engine, TensorRTEngine
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from traces import Traces

X = TensorSpec("hidden_states", ("batch", "img_tokens", 4), "float32")
T = TensorSpec("timestep", ("batch",), "float32")
H = TensorSpec("h", ("batch", "img_tokens", 8), "float16")
C = TensorSpec("c", ("batch", 3), "float32")
G = TensorSpec("g", ("batch", "img_tokens", 8), "float16")
TAP = TensorSpec("blocks.0", ("batch", "img_tokens", 8), "float16")
Y = TensorSpec("sample", ("batch", "img_tokens", 3), "float32")
RANGES = {"batch": Range(1, 2, 4), "img_tokens": Range(2, 8, 64), "txt_tokens": Range(2, 4, 8)}
NARROW = {**RANGES, "img_tokens": Range(8, 8, 16)}
# c is read by the last segment only, h by the one after it; the tap is an output that a later segment reads too.
Segments = Sequence[tuple[Sequence[TensorSpec], Sequence[TensorSpec]]]
CHAIN: Segments = (((X, T), (H, C)), ((H,), (TAP, G)), ((G, C, TAP, X), (Y,)))
CONTRACT = Contract((X, T), (Y, TAP), RANGES)
# The same model in two parts: T becomes a row of the table, which the trunk's first and last segments read.
M = TensorSpec(TABLE, ("batch", 3), "float32")
CONDITIONING = (((T,), (M,)),)
TRUNK = (((X, M), (H, C)), ((H,), (TAP, G)), ((G, C, TAP, X, M), (Y,)))
SPLIT = SplitContract(Contract((T,), (M,), {"batch": Range(1, 2, 16)}), Contract((X, M), (Y, TAP), RANGES))


def expected(inputs: Mapping[str, Tensor], segments: Segments = CHAIN) -> dict[str, Tensor]:
    """What the chain gives, computed without any runtime."""
    batch, img_tokens = inputs["hidden_states"].shape[:2]
    sizes = {"batch": batch, "img_tokens": img_tokens, "txt_tokens": 4}
    live = dict(inputs)
    for reads, writes in segments:
        made = {s.name: torch.empty(s.shape(sizes), dtype=getattr(torch, s.dtype)) for s in writes}
        fake_segment({s.name: live[s.name] for s in reads}, made)
        live |= made
    return {s.name: live[s.name] for s in CONTRACT.outputs}


def feed(batch: int = 2, img_tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Inputs, at addresses that TensorRT takes."""
    generator = torch.Generator().manual_seed(seed)
    values = {"hidden_states": torch.randn(batch, img_tokens, 4, generator=generator), "timestep": torch.rand(batch)}
    return {name: aligned(value) for name, value in values.items()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A machine with a GPU and both TensorRTs, for the test."""
    with fake_machine(monkeypatch) as state:
        yield state


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[EngineRecord, list[Path]]]:
    """Writes fake engine files, and what was built.

    ``build(target="rtx:sm89", profiles=(RANGES,), version=…, capabilities=…, change=lambda content: None)``; `change`
    edits each file's content, so that it is not what the record says. `part` names the files of one part of a model,
    whose `segments` these are.
    """

    def written(
        target: str = "rtx:sm89",
        profiles: tuple[Profile, ...] = (RANGES,),
        version: str = VERSION,
        capabilities: tuple[str, ...] = ("8.9",),
        change: Callable[[dict[str, Any]], object] = lambda content: None,
        segments: Segments = CHAIN,
        part: str = "segment",
    ) -> tuple[EngineRecord, list[Path]]:
        folder = tmp_path / "engines" / target.replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        records, files = [], []
        for i, (reads, writes) in enumerate(segments):
            content: dict[str, Any] = {
                "name": f"{part}-{i}",
                "workspace": 1000 + i,
                "inputs": [s.to_json() for s in reads],
                "outputs": [s.to_json() for s in writes],
                "profiles": [{axis: [r.min, r.opt, r.max] for axis, r in p.items()} for p in profiles],
            }
            change(content)
            file = folder / f"{part}-{i}.engine"
            file.write_text(json.dumps(content))
            files.append(file)
            place, size = str(file.relative_to(tmp_path)), file.stat().st_size
            records.append(SegmentRecord(place, size, (f"call.{i}",), tuple(reads), tuple(writes), {}, {}, {}, 0.0))
        flavour = RTX if target.startswith("rtx") else TENSORRT
        record = EngineRecord(
            target, flavour.name, version, capabilities, "how", "fused", tuple(profiles), tuple(records)
        )
        return record, files

    return written


@pytest.fixture
def bundled(tmp_path: Path) -> Callable[..., Any]:
    """``bundled({"rtx:sm89": record, "ort-cpu": None})``: what is asked of a bundle about its engines.

    With ``conditioning=record`` these are of the trunk of a model in two parts.
    """

    def entry(name: str, record: EngineRecord | None) -> dict[str, Any]:
        if record is None:
            return {"graph": f"{name}.onnx"}
        return {"graph": "model.onnx", **json.loads(json.dumps(record.to_json()))}

    def made(engines: Mapping[str, EngineRecord | None], conditioning: EngineRecord | None = None) -> Any:
        other = {} if conditioning is None else {"conditioning": entry("", conditioning)}
        fields = {
            "engines": {name: {**entry(name, record), **other} for name, record in engines.items()},
            "spec": {"name": "tiny"},
            "precision": "fp16",
            "contract": CONTRACT.to_json(),
        }
        manifest = SimpleNamespace(fields=fields)
        split = None if conditioning is None else SPLIT
        return SimpleNamespace(
            name="tiny", contract=CONTRACT, split=split, manifest=manifest, file=lambda name: tmp_path / name
        )

    return made


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def outputs(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Empty tensors for what the fake model makes of these inputs, and the size of each axis."""
    batch, img_tokens = inputs["hidden_states"].shape[:2]
    sizes = {"batch": batch, "img_tokens": img_tokens, "txt_tokens": 4}
    empty = {s.name: torch.empty(s.shape(sizes), dtype=getattr(torch, s.dtype)) for s in CONTRACT.outputs}
    return empty, sizes


def run(engine: TensorRTEngine, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an engine makes of inputs."""
    results, sizes = outputs(inputs)
    engine.run(inputs, results, sizes)
    return results


@pytest.fixture
def chain() -> Any:
    """The fake model: its parts, its profiles, inputs for it, and what it computes."""
    return SimpleNamespace(
        conditioning=CONDITIONING,
        trunk=TRUNK,
        split=SPLIT,
        ranges=RANGES,
        narrow=NARROW,
        feed=feed,
        expected=expected,
        outputs=outputs,
        run=run,
    )


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    """The ort-cpu engine of the tiny bundle; not to be closed."""
    return Engine.load(tiny_bundle, "ort-cpu")


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, traces: Traces) -> Callable[..., Path]:
    """An fp32 bundle of a model for ort-cpu, random weights (seed 0), not verified; not to be changed.

    ``bundle_of(spec, split=True)``: one in two parts.
    """
    made: dict[tuple[ModelSpec, bool], Path] = {}
    ranges = {"batch": Range(1, 1, 4), "img_tokens": Range(1, 16, 1024), "txt_tokens": Range(1, 8, 64)}

    def bundle(spec: ModelSpec, *, split: bool = False) -> Path:
        if (spec, split) not in made:
            out = tmp_path_factory.mktemp("fp32") / spec.name
            options: Any = {"ranges": ranges, "verify": False, "split_conditioning": split}
            with traces.within(spec):
                export(ExportRequest(spec, RandomWeights(0), PRECISIONS["fp32"], out=out, **options))
            made[spec, split] = out
        return made[spec, split]

    return bundle
