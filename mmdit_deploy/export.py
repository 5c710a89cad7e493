"""From a spec and weights to a verified bundle. The command line only parses and prints."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch

from mmdit_deploy.build import check_targets, dialect_of, execution_of
from mmdit_deploy.bundle import check_destination, staged_bundle, write_manifest
from mmdit_deploy.checkpoint import check_free_space, write_safetensors
from mmdit_deploy.checkpoint.weights import RandomWeights, WeightSource, stream_parts, weights_layout
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.errors import MachineError, MissingPackageError, ParityError, UsageError
from mmdit_deploy.graph.pipeline import Graphs, build_graphs
from mmdit_deploy.report import verdict_text, write_html
from mmdit_deploy.report.words import bounds, breaches
from mmdit_deploy.runtime import PROVIDERS
from mmdit_deploy.runtime.ort import import_onnxruntime
from mmdit_deploy.spec import ModelSpec, Precision
from mmdit_deploy.verify import (
    EngineUnderTest,
    ReferenceRecorder,
    Verdict,
    default_cases,
    verify_against_weights,
)
from mmdit_deploy.verify.reference import FILE_NAME as REFERENCE
from mmdit_deploy.verify.reference import MAX_BYTES

WEIGHTS = "weights.safetensors"
STANDARD = "model.onnx"
VERSIONED = (
    "mmdit-deploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "safetensors",
)

Log = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to.

    Args:
        spec: the architecture.
        source: its weights.
        precision: the compute type.
        targets: engines to build, e.g. ``("ort-cpu",)``.
        out: the bundle's directory; by default ``dist/<name>-<precision>``.
        ranges: by axis; the contract's defaults where not given.
        outputs: block outputs to expose, e.g. ``("blocks.12",)``.
        recipe: name of the recipe that the arguments came from.
        force: replace an existing bundle.
        verify: compare the engines with the eager model; without, the bundle says that it was not verified.
        thorough: verify more and larger shapes.
        graph_only: stop at the graphs; no weights are written, nothing can run.
    """

    spec: ModelSpec
    source: WeightSource
    precision: Precision
    targets: Sequence[str] = ("ort-cpu",)
    out: Path | None = None
    ranges: Mapping[str, Range] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    recipe: str | None = None
    force: bool = False
    verify: bool = True
    thorough: bool = False
    graph_only: bool = False

    @property
    def directory(self) -> Path:
        """Where the bundle goes."""
        suffix = "-graph" if self.graph_only else ""
        return self.out or Path("dist") / f"{self.spec.name}-{self.precision.name}{suffix}"


@dataclass(frozen=True)
class Preflight:
    """What an export will need, known before anything heavy.

    Args:
        parameters: of the model.
        weights_bytes: of the weights file.
        disk_bytes: of the whole bundle, rounded up.
    """

    parameters: int
    weights_bytes: int
    disk_bytes: int

    def text(self) -> str:
        return (
            f"{self.parameters / 1e9:.3f} B parameters, weights file {self.weights_bytes / 1e9:.3f} GB, "
            f"disk needed {self.disk_bytes / 1e9:.3f} GB"
        )


def preflight(request: ExportRequest) -> Preflight:
    """Check arguments, targets and the disk, and say what the export needs.

    Raises:
        MMDiTError: what the request breaks; nothing was written.
    """
    _checked(request)
    check_destination(request.directory, force=request.force)
    layout = weights_layout(request.spec, getattr(torch, request.precision.dtype))
    numel = sum(t.nbytes for t in layout.tensors.values()) // request.precision.itemsize
    disk = (0 if request.graph_only else layout.total_bytes) + 32 * 2**20  # graphs, reference and report
    # The parents of the bundle are made with it; the disk is that of the first one there is.
    parent = next(p for p in request.directory.absolute().parents if os.path.isdir(p))
    check_free_space(parent / request.directory.name, disk)
    return Preflight(numel, layout.total_bytes, disk)


def _checked(request: ExportRequest) -> tuple[tuple[str, ...], Contract]:
    """The targets and the contract, after all checks that cost nothing."""
    targets, spec = check_targets(request.targets), request.spec
    blocks = [f"blocks.{i}" for i in range(spec.depth)]
    if len(set(request.outputs)) < len(request.outputs) or not set(request.outputs) <= set(blocks):
        raise UsageError(
            f"outputs are named {blocks[0]} to {blocks[-1]}, each once",
            received=", ".join(ascii(name) for name in request.outputs),
            fix="name blocks of this model",
        )
    if request.verify and not request.graph_only:
        for target in targets:
            _check_runs_here(target)
    return targets, Contract.of(spec, request.precision, request.ranges, outputs=request.outputs)


def default_targets() -> tuple[str, ...]:
    """The engine to build where none is named: for this machine's GPU where ONNX Runtime can use it, else its CPU."""
    try:
        providers = import_onnxruntime("ort-cuda").get_available_providers()
    except MissingPackageError:
        providers = []
    # The GPU build of ONNX Runtime lists its provider on machines without a GPU too.
    return ("ort-cuda",) if PROVIDERS["ort-cuda"] in providers and torch.cuda.is_available() else ("ort-cpu",)


def _check_runs_here(target: str) -> None:
    """Verification runs the engine: say what is missing before gigabytes are written, not after."""
    available = import_onnxruntime(target).get_available_providers()
    if PROVIDERS[target] not in available:
        raise MachineError(
            f"verifying the target {target} runs it on ONNX Runtime's {PROVIDERS[target]}",
            received=f"this installation has {', '.join(available)}",
            fix="export where it runs (pip install 'mmdit-deploy[gpu]'), or add --no-verify",
        )


@dataclass(frozen=True)
class ExportResult:
    """A bundle on the disk, and the verdicts on its engines (none with `verify` or `graph_only` off)."""

    path: Path
    graphs: Graphs
    verdicts: tuple[Verdict, ...]


def export(request: ExportRequest, log: Log = lambda _: None) -> ExportResult:
    """Build a bundle, verify it, and put it in its place: whole or not at all.

    Args:
        log: gets a line for people as each stage begins or ends.

    Raises:
        ParityError: an engine is out of tolerance; no bundle is left.
        MMDiTError: anything else that the request or this machine does not allow.
    """
    spec, precision = request.spec, request.precision
    targets, contract = _checked(request)
    dtype = getattr(torch, precision.dtype)
    dialects = {target: dialect_of(target, precision) for target in targets}
    layout = weights_layout(spec, dtype, {"format": "pt"})
    if isinstance(request.source, RandomWeights):
        log(f"weights: {request.source.description} — no checkpoint was given")
    with staged_bundle(request.directory, force=request.force) as folder:
        graphs = build_graphs(
            spec,
            contract,
            precision,
            layout,
            dialects=tuple(dict.fromkeys(dialects.values())),
            outputs=request.outputs,
        )
        onnx.save(graphs.standard, folder / STANDARD)
        for dialect, proto in graphs.lowered.items():
            onnx.save(proto, folder / _graph_file(dialect))
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in graphs.seconds.items())
        log(f"graph: {len(graphs.kinds)} kinds of call traced ({stages})")

        hashes = {}
        verdicts: list[Verdict] = []
        if not request.graph_only:
            log(f"weights: writing {layout.total_bytes / 1e9:.2f} GB as {precision.name}")
            written = write_safetensors(folder / WEIGHTS, layout, stream_parts(spec, request.source, dtype))
            hashes[WEIGHTS] = (written.size, written.sha256)
        if request.verify and not request.graph_only:
            cases = default_cases(contract, thorough=request.thorough)
            recorder = ReferenceRecorder(cases)
            for target in targets:
                engine = EngineUnderTest(
                    request.directory.name,
                    folder / _graph_file(dialects[target]),
                    target,
                    spec,
                    contract,
                    precision,
                    request.outputs,
                )
                log(f"verify: {target}, {len(cases)} cases")
                verdicts.append(
                    verify_against_weights(
                        engine,
                        request.source,
                        cases,
                        record=None if verdicts else recorder,  # the reference is the same for every engine
                        progress=lambda name, i, n: log(f"verify: {name} ({i + 1} of {n})"),
                    )
                )
                log(verdict_text(verdicts[-1]))
            _refuse_failures(verdicts)
            kept = recorder.write(folder)
            if kept < len(cases):
                log(f"{REFERENCE}: {kept} of {len(cases)} cases fit into its {MAX_BYTES >> 20} MiB")
        fields = _manifest_fields(request, contract, graphs, dialects, verdicts)
        _write_reports(folder, fields, verdicts)
        write_manifest(folder, fields, hashes)
    return ExportResult(request.directory, graphs, tuple(verdicts))


def _graph_file(dialect: str) -> str:
    return f"model.{dialect}.onnx"


_MORE_PRECISE = {
    "fp16": "--bf16 has more range, --fp32 more of both",
    "bf16": "--fp16 has more digits, --fp32 more of both",
    "fp32": "report this as a bug",
}


def _refuse_failures(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        failure = verdict.first_failure
        if failure is not None:
            raise ParityError(
                f"{verdict.target} must compute the eager model within tolerance: {bounds(verdict.tolerance)}",
                received=f"{failure.name} ({failure.level}): {breaches(failure, verdict.tolerance)}; {failure.case}",
                fix=f"{_MORE_PRECISE[verdict.precision]}; --no-verify writes the bundle all the same, unproven",
            )


def _manifest_fields(
    request: ExportRequest,
    contract: Contract,
    graphs: Graphs,
    dialects: Mapping[str, str],
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    source = request.source
    random = isinstance(source, RandomWeights)
    return {
        "name": request.spec.name,
        "precision": request.precision.name,
        "spec": request.spec.to_json(),
        "contract": contract.to_json(),
        "outputs": list(request.outputs),
        "weights": {
            "origin": source.description,
            "random": random,
            **({"seed": source.seed} if isinstance(source, RandomWeights) else {}),
            "file": None if request.graph_only else WEIGHTS,
        },
        "engines": {}
        if request.graph_only
        else {
            target: {
                "graph": _graph_file(dialect),
                "dialect": dialect,
                "execution": execution_of(target, request.precision),
            }
            for target, dialect in dialects.items()
        },
        "recipe": request.recipe,
        "graph": {
            "kinds": list(graphs.kinds),
            "census": dict(graphs.census),
            "passes": {name: {r.name: r.count for r in results} for name, results in graphs.passes.items()},
        },
        "verified": [v.target for v in verdicts if v.passed],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write_reports(folder: Path, fields: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    if not verdicts:
        return
    data = {"verdicts": [v.to_json() for v in verdicts]}
    (folder / "parity.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    facts = {
        "model": fields["name"],
        "precision": fields["precision"],
        "weights": fields["weights"]["origin"],
        "machine": f"{platform.system()} {platform.machine()}",
        **{f"{name} version": version for name, version in fields["versions"].items()},
    }
    write_html(verdicts, folder / "report.html", title=f"{fields['name']} {fields['precision']}", facts=facts)
