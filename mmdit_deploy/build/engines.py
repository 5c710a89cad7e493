"""All engines of one TensorRT target: segment after segment, each built, then checked by the fusion gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from mmdit_deploy.build.attention_sizes import check_profiles
from mmdit_deploy.build.build_log import BuildLog
from mmdit_deploy.build.engine_builder import BuiltEngine, build_engine
from mmdit_deploy.build.flavours import Flavour
from mmdit_deploy.build.floor import Floor, floors
from mmdit_deploy.build.gate import check_fusion
from mmdit_deploy.build.layers import EngineLayer, kernels_by_call, kernels_by_type
from mmdit_deploy.build.layers_file import write_layers
from mmdit_deploy.build.opt_sizes import at_opt
from mmdit_deploy.build.progress import BuildProgress
from mmdit_deploy.build.quantized import check_quantization
from mmdit_deploy.build.records import EngineRecord, SegmentRecord
from mmdit_deploy.build.targets import Target, dialect_of, execution_of
from mmdit_deploy.contract import Contract, TensorSpec
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.census import implied_by_call
from mmdit_deploy.graph.extract import extract_segment
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.graph.lower.batched_modulation import batched_modulation
from mmdit_deploy.graph.modulations import check_modulations
from mmdit_deploy.graph.onnx_file import to_ir
from mmdit_deploy.graph.split import Table, through_table
from mmdit_deploy.hashed_file import WrittenFile
from mmdit_deploy.model import calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import ModelSpec, Precision

Log = Callable[[str], None]
BUILD_LOG = "build.log"


def build_target(
    target: Target,
    spec: ModelSpec,
    precision: Precision,
    contract: Contract,
    standard: onnx.ModelProto,
    folder: Path,
    segments: Sequence[Sequence[str]],
    log: Log,
    plan: PrecisionPlan | None = None,
    *,
    table: Table | None = None,
    part: str = "",
) -> tuple[EngineRecord, dict[str, tuple[int, str]]]:
    """Build a target's engines into a bundle's folder.

    Args:
        target: of a TensorRT.
        standard: the standard graph.
        folder: the bundle's, with the weights file.
        segments: the model's calls, by segment.
        log: gets a line for people now and then, and the builder's warnings.
        plan: what of it is quantized; nothing where there is none.
        table: what modulation passes through, of a model that is split in two; `contract` and `segments` are then those
            of one part.
        part: a folder of its own within the target's, for a part besides the trunk.

    Returns:
        What was built, and size and SHA-256 of the engine files, by path in the bundle.

    Raises:
        MissingPackageError: the flavour is not installed.
        UsageError: the plan has attentions in FP8 that TensorRT has no kernel for, at a profile's minimum.
        GraphError: TensorRT cannot build the graph, did not fuse what the spec implies, or does not compute with
            quantized numbers what the plan quantizes; names a copy of the build log, which stays when the bundle's
            folder goes.
        MachineError: the flavour is too old, the disk is full, or memory ran out.
        KeyboardInterrupt: Ctrl-C.
        BaseException: what `log` raised.
    """
    flavour = target.flavour
    if flavour is None:
        raise ValueError(f"{target.name} is no TensorRT target")
    plan = plan or PrecisionPlan(precision)
    if any(plan.attentions.get(call) for run in segments for call in run):
        check_profiles(spec, plan, contract.profiles)
    fused = precision.base in flavour.fused_attention
    place = f"{target.folder}/{part}" if part else target.folder
    whole = f"{target.name} {part}" if part else target.name
    into = folder / place
    into.mkdir(parents=True)
    records: list[SegmentRecord] = []
    layers: dict[str, Sequence[EngineLayer]] = {}
    files: dict[str, WrittenFile] = {}
    modulating = {call.path for call in calls(spec) if call.modulates}
    with BuildLog(into / BUILD_LOG, lambda line: log(f"build: {target.name}: {line}")) as build_log:
        for i, run in enumerate(segments):
            what = whole if len(segments) == 1 else f"{whole} segment {i + 1} of {len(segments)}"
            log(f"build: {what}, {run[0]} to {run[-1]}")
            build_log.begin(what)
            segment = extract_segment(standard, run, f"{spec.name}.{part or i}")
            if table is not None:
                segment = through_table(segment, table)
            graph = _lowered(segment, folder, dialect_of(target, precision), run, modulating)
            file = f"{place}/segment-{i}.engine"
            progress = BuildProgress(_reporter(what, log))
            with build_log.kept_on_failure():
                built = build_engine(
                    flavour,
                    graph,
                    folder,
                    folder / file,
                    build_log,
                    profiles=contract.profiles,
                    capabilities=target.capabilities,
                    fused_attention=fused,
                    progress=progress,
                )
                fp8 = {call: len(plan.attentions[call]) for call in run if plan.attentions.get(call)}
                found = check_fusion(
                    graph,
                    built.layers,
                    implied_by_call(spec, run),
                    fused=fused,
                    profiles=len(contract.profiles),
                    what=what,
                    fp8=fp8,
                )
                quantized = check_quantization(graph, built.layers, plan, run, what=what)
            layers[file], files[file] = at_opt(built.layers, graph, contract.profiles), built.file
            opts = [{axis: sizes.opt for axis, sizes in profile.items()} for profile in contract.profiles]
            least = tuple(floors(spec, opt, precision.itemsize, run, plan) for opt in opts)
            record = _segment_record(file, run, graph, built, found, least)
            records.append(replace(record, fp8_attentions=fp8, quantized_products=quantized))
    made = EngineRecord(
        target=target.name,
        flavour=flavour.name,
        version=flavour.version() or str(flavour.load(target.name).__version__),
        capabilities=_capabilities(flavour, target),
        execution=execution_of(target, precision),
        attention="fused" if fused else "written out",
        profiles=contract.profiles,
        segments=tuple(records),
    )
    implied = implied_by_call(spec, [call for run in segments for call in run])
    attentions = sum(ops.get("Attention", 0) for ops in implied.values())
    hashes = {name: (file.size, file.sha256) for name, file in files.items()}
    write_layers(into, made, layers, hashes)
    log(f"build: {_summary(made, attentions, whole)}")
    return made, hashes


def _segment_record(
    file: str,
    calls: Sequence[str],
    graph: onnx.ModelProto,
    built: BuiltEngine,
    attentions: Mapping[str, int],
    least: tuple[Mapping[str, Floor], ...],
) -> SegmentRecord:
    return SegmentRecord(
        file=file,
        nbytes=built.file.size,
        calls=tuple(calls),
        inputs=_tensors(graph.graph.input),
        outputs=_tensors(graph.graph.output),
        kernels_by_type=kernels_by_type(built.layers),
        kernels_by_call=kernels_by_call(built.layers, calls),
        fused_attentions=attentions,
        seconds=built.seconds,
        activation_bytes=built.activation_bytes,
        floors=least,
    )


def _lowered(
    graph: onnx.ModelProto, folder: Path, dialect: str, calls: Sequence[str], modulating: Collection[str]
) -> onnx.ModelProto:
    lowered, results = lower(to_ir(graph, folder), dialect)
    modulations = [call for call in calls if call in modulating]
    batched = {result.name: result.count for result in results}[batched_modulation.name]
    if len(modulations) > 1 and batched != len(modulations):
        raise GraphError(
            f"{graph.graph.name} has one product for all of its {len(modulations)} modulations",
            received=f"{batched} of them are in it",
            fix="report this as a bug: the build would take a third more memory",
        )
    for value in (value for function in lowered.functions.values() for value in function.inputs):
        if value.type is None:  # of one type in some calls, and of another in others: ONNX has no shape without
            value.shape = None
    made = ir.to_proto(lowered)
    check_modulations(made, graph, modulations)
    return made


def _reporter(what: str, log: Log) -> Callable[[str, int, int], None]:
    start = time.monotonic()

    def report(phase: str, done: int, steps: int) -> None:
        log(f"build: {what}, {time.monotonic() - start:.0f} s: {phase} ({done} of {steps})")

    return report


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            value.name,
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,  # torch's name too
        )
        for value in values
    )


def _capabilities(flavour: Flavour, target: Target) -> tuple[str, ...]:
    """As CUDA writes them: those named, or this machine's GPU's."""
    if target.capabilities:
        return tuple(flavour.capabilities[sm] for sm in target.capabilities)
    import torch

    return ("{}.{}".format(*torch.cuda.get_device_capability()),)


def _summary(record: EngineRecord, attentions: int, what: str) -> str:
    fused = sum(record.fused_attentions.values())
    fusion = f"{fused} of {attentions} attentions fused" if fused else f"{attentions} attentions written out"
    fusion = fusion if attentions else "no attention"
    if fp8 := sum(record.fp8_attentions.values()):
        fusion += f", {fp8} of them in FP8"
    quantized = [f"{n} {scheme}" for scheme, n in record.quantized_by_scheme.most_common()]
    fusion += f", quantized products: {' and '.join(quantized)}" if quantized else ""
    seconds = sum(segment.seconds for segment in record.segments)
    memory = record.activation_bytes
    activations = "" if memory is None else f"{memory / 1e9:.2f} GB of activations, "
    profiles = f", {len(record.profiles)} profiles" if len(record.profiles) > 1 else ""
    return (
        f"{what}: {record.nbytes / 1e9:.2f} GB, {record.kernels} kernels{profiles}, {fusion}, "
        f"{activations}{seconds:.0f} s"
    )
