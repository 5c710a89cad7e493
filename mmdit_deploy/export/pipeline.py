"""The export itself: graphs, weights, engines, verification, manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from mmdit_deploy.build import EngineRecord, Target, dialect_of, stepped_dialect_of
from mmdit_deploy.bundle import check_destination, graph_file, staged_bundle, write_manifest
from mmdit_deploy.checkpoint import write_safetensors
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import ParityError
from mmdit_deploy.export.machine import check_builds_here, check_verifies_here
from mmdit_deploy.export.manifest import STANDARD, WEIGHTS, manifest_fields, write_reports
from mmdit_deploy.export.parts import CONDITIONING, TRUNK, BuiltEngines, build_engines, write_parts
from mmdit_deploy.export.planning import calibrates, check_calibration, plan_precision
from mmdit_deploy.export.request import ExportRequest
from mmdit_deploy.export.request_checks import check_request
from mmdit_deploy.graph.pipeline import Graphs, build_graphs
from mmdit_deploy.graph.split import SplitGraphs
from mmdit_deploy.graph.trace import shared_traces
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.weights import planned_layout, stream_planned
from mmdit_deploy.preflight import Plan, check_plan, make_plan
from mmdit_deploy.report import verdict_text
from mmdit_deploy.report.words import bounds, breaches
from mmdit_deploy.runtime.split import Loadable, Parts
from mmdit_deploy.verify import EngineUnderTest, ReferenceRecorder, Verdict, default_cases, verify_against_weights
from mmdit_deploy.verify.reference import FILE_NAME as REFERENCE
from mmdit_deploy.verify.reference import MAX_BYTES

Log = Callable[[str], None]


def preflight(request: ExportRequest) -> Plan:
    """Check arguments, packages, memory and disk, and say what the export needs. Nothing is written.

    Raises:
        MMDiTError: what the request breaks, or this machine lacks.
    """
    targets, contract = check_request(request)
    check_calibration(request)
    check_destination(request.directory, force=request.force)
    plan = make_plan(
        request.spec,
        request.precision,
        contract,
        targets,
        from_checkpoint=not isinstance(request.source, RandomWeights),
        quantized=request.structure,
        calibrated=calibrates(request),
        budgeted=request.budget is not None,
        islands=request.seeks_islands,
        merged=bool(request.loras),
        segments=request.segments,
        split=request.split_conditioning,
        verify=request.verify,
        thorough=request.thorough,
        graph_only=request.graph_only,
    )
    if not request.graph_only:
        for target in targets:
            check_builds_here(target)
            if request.verify:
                check_verifies_here(target)
    check_plan(plan, request.directory)
    return plan


@dataclass(frozen=True)
class ExportResult:
    """A bundle on the disk.

    Args:
        engines: of the TensorRT targets, by name.
        verdicts: on its engines; none with `verify` or `graph_only` off.
        split: the graphs of its parts, where the model is in two; `engines` are then those of the trunk.
        conditioning: the engines of the other part.
    """

    path: Path
    graphs: Graphs
    engines: Mapping[str, EngineRecord]
    verdicts: tuple[Verdict, ...]
    split: SplitGraphs | None = None
    conditioning: Mapping[str, EngineRecord] = field(default_factory=dict)


def export(request: ExportRequest, log: Log = lambda _: None, plan: Plan | None = None) -> ExportResult:
    """Build a bundle, verify it, and put it in its place: whole or not at all.

    Args:
        log: gets a line for people as each stage begins or ends.
        plan: what `preflight` said of this request; by default it is asked.

    Raises:
        ParityError: an engine is out of tolerance; no bundle is left.
        MMDiTError: anything else that the request or this machine does not allow.
    """
    plan = plan or preflight(request)
    spec, precision = request.spec, request.precision
    targets, contract = check_request(request)
    if isinstance(request.source, RandomWeights):
        log(f"weights: {request.source.description} — no checkpoint was given")
    if request.leaves_attention:
        log(f"warning: attentions stay in {precision.base}: TensorRT fuses FP8 ones from 32 tokens on, in all ranges")
    if any(target.flavour for target in targets):
        for axis in _costly(contract):
            log(f"warning: {axis} from 1 costs a TensorRT plan several kernels a block; from 2 it does not")
    with shared_traces(), staged_bundle(request.directory, force=request.force) as folder:
        planned = plan_precision(request, folder, log)
        layout = planned_layout(spec, planned.plan, {"format": "pt"})
        bf16 = bool(planned.plan.bf16_attentions)
        shipped = dict.fromkeys(dialect_of(target, precision, bf16_attentions=bf16) for target in targets)
        stepped = dict.fromkeys(stepped_dialect_of(target, precision, bf16_attentions=bf16) for target in targets)
        graphs = build_graphs(
            spec,
            contract,
            precision,
            layout,
            dialects=tuple({**shipped, **stepped}),
            outputs=request.outputs,
            plan=planned.plan,
        )
        onnx.save(graphs.standard, folder / STANDARD)
        for dialect in shipped:
            onnx.save(graphs.lowered[dialect], folder / graph_file(dialect))
        split = None
        if request.split_conditioning:
            split = write_parts(request, contract, graphs.standard, shipped, folder, planned.plan)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in graphs.seconds.items())
        log(f"graph: {len(graphs.kinds)} kinds of call traced ({stages})")

        hashes: dict[str, tuple[int, str]] = {}
        built = BuiltEngines()
        verdicts: tuple[Verdict, ...] = ()
        if not request.graph_only:
            log(f"weights: writing {layout.total_bytes / 1e9:.2f} GB as {precision.label}")
            source = stream_planned(spec, request.weights, planned.plan)
            written = write_safetensors(folder / WEIGHTS, layout, source)
            hashes[WEIGHTS] = (written.size, written.sha256)
            built = build_engines(request, contract, graphs, split, targets, plan.segments, folder, planned.plan, log)
            hashes |= built.hashes
            if request.verify:
                verdicts = _verify(request, contract, folder, graphs, split, targets, built, planned.plan, log)
        fields = manifest_fields(request, contract, graphs, split, targets, built, verdicts, planned)
        write_reports(folder, fields, verdicts)
        write_manifest(folder, fields, hashes)
    return ExportResult(request.directory, graphs, built.records, verdicts, split, built.conditioning)


def _costly(contract: Contract) -> list[str]:
    """Token axes that may have one token: TensorRT then plans for vectors as well."""
    return [axis for axis in ("img_tokens", "txt_tokens") if any(p[axis].min == 1 for p in contract.profiles)]


def _verify(
    request: ExportRequest,
    contract: Contract,
    folder: Path,
    graphs: Graphs,
    split: SplitGraphs | None,
    targets: Sequence[Target],
    built: BuiltEngines,
    plan: PrecisionPlan,
    log: Log,
) -> tuple[Verdict, ...]:
    """Verify every target and record the reference; the verdicts in the order of the targets."""
    cases = default_cases(contract, request.precision, thorough=request.thorough)
    recorder = ReferenceRecorder(cases)
    engines = [_under_test(request, contract, folder, graphs, split, target, built, plan) for target in targets]
    # ONNX Runtime's engines are stepped through, each in full. TensorRT's cannot be: their graph is, once per kind of
    # call beside the first of the others, or in full where there is no other.
    full = [engine for engine in engines if engine.target.flavour is None] or engines[:1]
    beside = [engine for engine in engines if engine not in full]
    verdicts: dict[str, Verdict] = {}
    for engine in full:
        log(f"verify: {engine.target.name}, {len(cases)} cases")
        made = verify_against_weights(
            engine,
            request.weights,
            cases,
            beside=() if verdicts else beside,
            record=None if verdicts else recorder,  # the reference is the same for every engine
            progress=lambda name, i, n: log(f"verify: {name} ({i + 1} of {n})"),
        )
        for verdict in made:
            verdicts[verdict.target] = verdict
            log(verdict_text(verdict))
    _refuse_failures(tuple(verdicts.values()))
    kept = recorder.write(folder)
    if kept < len(cases):
        log(f"{REFERENCE}: {kept} of {len(cases)} cases fit into its {MAX_BYTES >> 20} MiB")
    return tuple(verdicts[target.name] for target in targets)


def _under_test(
    request: ExportRequest,
    contract: Contract,
    folder: Path,
    graphs: Graphs,
    split: SplitGraphs | None,
    target: Target,
    built: BuiltEngines,
    plan: PrecisionPlan,
) -> EngineUnderTest:
    bf16 = bool(plan.bf16_attentions)
    dialect = dialect_of(target, request.precision, bf16_attentions=bf16)

    def loadable(records: Mapping[str, EngineRecord], part: str) -> Loadable:
        record = records.get(target.name)
        names = [graph_file(dialect, part)] if record is None else [segment.file for segment in record.segments]
        return Loadable(tuple(folder / name for name in names), record)

    own = loadable(built.records, "model" if split is None else TRUNK)
    parts = None if split is None else Parts(split.contract, loadable(built.conditioning, CONDITIONING))
    return EngineUnderTest(
        name=request.directory.name,
        target=target,
        spec=request.spec,
        contract=contract,
        precision=request.precision,
        graph=graphs.of(stepped_dialect_of(target, request.precision, bf16_attentions=bf16)),
        folder=folder,
        files=own.files,
        record=own.record,
        outputs=request.outputs,
        plan=plan,
        parts=parts,
    )


_MORE_PRECISE = {
    "fp16": "--fp16-plan auto keeps in fp32 what must be, --bf16 has more range, --fp32 more of both",
    "bf16": "--fp16 has more digits, --fp32 more of both",
    "fp32": "report this as a bug",
    "fp8": "--budget rel_l2=0.05 quantizes less, --quantize attention=none leaves a role out",
    "int8": "--budget rel_l2=0.05 quantizes less, --fp8 suits values of unlike size better",
    "fp4": "--budget rel_l2=0.1 quantizes less, --fp8 has twice the bits",
    "w4a16": "--budget rel_l2=0.1 quantizes less, --fp8 has twice the bits",
}


def _refuse_failures(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        failure = verdict.first_failure
        if failure is not None:
            tolerance = verdict.tolerance_of(failure)
            raise ParityError(
                f"{verdict.target} must compute the eager model within tolerance: {bounds(tolerance)}",
                received=f"{failure.name} ({failure.level}): {breaches(failure, tolerance)}; {failure.case}",
                fix=f"{_MORE_PRECISE[verdict.precision]}; --no-verify writes the bundle all the same, unproven",
            )
