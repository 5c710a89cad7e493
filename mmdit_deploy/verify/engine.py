"""Verify one engine: call by call, and whole where it can run, with a verdict at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from mmdit_deploy.build import execution_of
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.errors import MachineError
from mmdit_deploy.graph.split_check import check_parts
from mmdit_deploy.machine import machine_facts
from mmdit_deploy.model import Call, calls
from mmdit_deploy.verify.as_planned import check_as_planned, unlike
from mmdit_deploy.verify.attributes import check_attributes
from mmdit_deploy.verify.bounds import as_json
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.noise_floor import FloorChain, FloorRequest, Measurement, floor_ways
from mmdit_deploy.verify.records import Case, Check, Verdict
from mmdit_deploy.verify.reference import Reference, ReferenceRecorder
from mmdit_deploy.verify.streaming import Progress, check_output, first_calls, replay_parity, stream_parity
from mmdit_deploy.verify.under_test import EngineUnderTest
from mmdit_deploy.verify.whole import WholeEngine, in_words, whole_engine_refusal
from mmdit_deploy.verify.wiring import check_wiring


def verify_against_weights(
    engine: EngineUnderTest,
    source: WeightSource,
    cases: Sequence[Case],
    *,
    beside: Sequence[EngineUnderTest] = (),
    record: ReferenceRecorder | None = None,
    noise_floor: FloorRequest = "auto",
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Compare with the eager fp32 model that holds the source's weights: local and cumulative errors, by block.

    Args:
        beside: other engines of the same model and precision. Of their graphs, one call of each function is compared,
            which is all that can differ, and they are run whole where this machine can.
        record: keeps the eager model's figures for those who have no weights.
        noise_floor: what to measure of it, see `floor_ways`.

    Returns:
        The engine's verdict, then those of the engines beside it.

    Raises:
        MachineError: the engine's graph cannot run here, or there is no compiler for the noise floor.
        CheckpointError: the source cannot be read.
        UsageError: there is no such noise floor.
    """
    start = time.perf_counter()
    chain = calls(engine.spec, engine.outputs)
    inputs = [case_inputs(case, engine.contract, engine.spec) for case in cases]
    floors = [FloorChain(way, inputs, few) for way, few in floor_ways(noise_floor, engine.precision, cases)]
    checks, checks_beside, outputs = stream_parity(
        chain,
        engine.contract,
        EagerCalls(engine.spec, source),
        _engine_calls(engine, chain),
        inputs,
        cases,
        engine.bounds,
        beside=[_engine_calls(other, chain) for other in beside],
        floors=floors,
        record=record,
        progress=progress,
    )
    if engine.plan is not None and engine.precision.quantized:
        nodes = check_as_planned(engine, source, unlike(cases), beside=beside, progress=progress)
        for made, found in zip((checks, *checks_beside), nodes, strict=True):
            made += found
    measured = [floor.measured for floor in floors]
    if record is not None:
        record.floors = measured
    expected = _Expected(cases, inputs, outputs, measured)
    reference = "the eager model in fp32"
    stepped = [(engine, checks, f"{len(chain)} calls one by one")]
    stepped += [
        (other, made, f"one call of each of {len(first_calls(other.graph, chain))} kinds")
        for other, made in zip(beside, checks_beside, strict=True)
    ]
    return tuple(
        _verdict(one, source.description, made, expected, start, reference, (_how(one, how, cases),))
        for one, made, how in stepped
    )


def verify_against_reference(
    engine: EngineUnderTest, weights: str, reference: Reference, *, progress: Progress | None = None
) -> Verdict:
    """Compare with what the eager model computed at export: no checkpoint needed.

    ONNX Runtime's engines are stepped through and run whole, TensorRT's are run whole.

    Args:
        weights: where the weights came from, as the manifest says.

    Raises:
        MachineError: the engine cannot run here.
    """
    start = time.perf_counter()
    checks: list[Check] = []
    # What was recorded counts; what was too large to be is the same tensor on any machine.
    inputs = [
        {**case_inputs(case, engine.contract, engine.spec), **reference.inputs(i)}
        for i, case in enumerate(reference.cases)
    ]
    executed: tuple[str, ...] = ()
    if engine.record is None:
        chain = calls(engine.spec, engine.outputs)
        made = _engine_calls(engine, chain)
        checks = replay_parity(chain, engine.contract, made, inputs, reference, engine.bounds, progress=progress)
        executed = (_how(engine, f"{len(chain)} calls one by one", reference.cases),)
    count = range(len(reference.cases))
    blocks = [t.name for t in engine.contract.outputs if t.name != "sample"]
    expected = _Expected(
        reference.cases,
        inputs,
        [{"sample": reference.sample(i), **{name: reference.digest(i, name) for name in blocks}} for i in count],
        reference.floors,
    )
    against = "the eager model in fp32, as recorded in reference.safetensors at export"
    return _verdict(engine, weights, checks, expected, start, against, executed)


@dataclass(frozen=True)
class _Expected:
    """Inputs of the whole engine, what it should compute, by case, and how far that is from itself."""

    cases: Sequence[Case]
    inputs: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Mapping[str, Tensor]]
    floors: Sequence[Measurement]


def _engine_calls(engine: EngineUnderTest, chain: Sequence[Call]) -> EngineCalls:
    check_wiring(engine.graph, chain)
    check_attributes(engine.graph)
    if engine.parts is not None and engine.record is None:
        (conditioning,), (trunk,) = engine.parts.conditioning.files, engine.files
        check_parts(engine.graph, _graph(conditioning), _graph(trunk))
    dtype = getattr(torch, engine.precision.dtype)
    return EngineCalls(engine.graph, engine.folder, engine.stepped_on.name, dtype)


def _graph(file: Path) -> onnx.ModelProto:
    return onnx.load(file, load_external_data=False)


def _how(engine: EngineUnderTest, what: str, cases: Sequence[Case]) -> str:
    graph = "" if engine.record is None else "its graph, "
    return f"{graph}{what}, {len(cases)} cases: {execution_of(engine.stepped_on, engine.precision)}"


def _verdict(
    engine: EngineUnderTest,
    weights: str,
    checks: list[Check],
    expected: _Expected,
    start: float,
    reference: str,
    executed: tuple[str, ...],
) -> Verdict:
    """The verdict on what was stepped through, with the whole engine's run where there can be one."""
    refusal = whole_engine_refusal(engine)
    not_executed: tuple[str, ...] = ()
    if refusal is None:
        try:
            checks = checks + _run_whole(engine, expected)
        except MachineError as error:
            if engine.record is None or not checks:
                raise
            # e.g. no room on the GPU: what took so long to build is not thrown away for that
            refusal = in_words(error)
    if refusal is None:
        how = execution_of(engine.target, engine.precision)
        device = f" on {torch.cuda.get_device_name()}" if engine.target.device == "cuda" else ""
        whole = "the whole engine" if engine.parts is None else "the whole engine, conditioning and trunk"
        executed = (*executed, f"{whole}, {len(expected.cases)} cases: {how}{device}")
    elif engine.record is None:
        not_executed = (f"the whole engine in one session: {refusal}",)
    else:
        not_executed = (f"the engine: built, not executed: {refusal}",)
    engine_executed = engine.record is None or refusal is None
    if expected.floors:
        checks = expected.floors[0].attach(checks, expected.cases)
    return Verdict(
        bundle=engine.name,
        target=engine.target.name,
        precision=engine.precision.name,
        weights=weights,
        reference=reference,
        executed=executed,
        not_executed=not_executed,
        tolerance=as_json(engine.bounds.step),
        checks=tuple(checks),
        seconds=time.perf_counter() - start,
        engine_executed=engine_executed,
        machine=machine_facts() if engine_executed else {},
        tolerances=engine.bounds.named,
        tolerance_source=engine.tolerances.source,
        noise_floors=tuple(floor.record() for floor in expected.floors),
    )


def _run_whole(engine: EngineUnderTest, expected: _Expected) -> list[Check]:
    tolerance = engine.bounds.step
    checks = []
    with WholeEngine(engine) as whole:
        for case, values, wanted in zip(expected.cases, expected.inputs, expected.outputs, strict=True):
            outputs = whole.run(values)
            checks += [check_output(name, case, outputs[name], wanted[name], tolerance) for name in wanted]
    return checks
