"""Verify one engine: call by call, and whole where it can run, with a verdict at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from mmdit_deploy.build import EngineRecord, Target, execution_of, parse_target
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.errors import MachineError
from mmdit_deploy.machine import machine_facts
from mmdit_deploy.model import Call, calls
from mmdit_deploy.runtime import available_memory, check_runs_here, open_runner
from mmdit_deploy.spec import ModelSpec, Precision
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.chains import EngineCalls, axis_sizes
from mmdit_deploy.verify.records import Case, Check, Verdict
from mmdit_deploy.verify.reference import Reference, ReferenceRecorder
from mmdit_deploy.verify.streaming import Progress, check_output, replay_parity, stream_parity
from mmdit_deploy.verify.tolerances import TOLERANCES
from mmdit_deploy.verify.wiring import check_wiring

# Anonymous memory of an ONNX Runtime CPU session over bytes of weights as fp32: the copy that is computed with, and
# activations. Measured with 2.03 B parameters in fp16: 10.0 GB (1.23), and some room.
ORT_CPU_MEMORY_FACTOR = 1.4
GIB = 2**30


@dataclass(frozen=True)
class EngineUnderTest:
    """What is verified: an engine, the graph to step through, and what they should compute.

    Args:
        name: the bundle's.
        target: which of its engines.
        graph: in the dialect `stepped_dialect_of` the target; weights by reference.
        folder: the weights file's.
        files: what the engine is loaded from: the graph's file for ONNX Runtime, the engine files for TensorRT.
        record: what was built, for TensorRT.
        outputs: block outputs that the graph exposes besides ``sample``.
        whole: also run the whole engine in one go, where this machine can.
    """

    name: str
    target: Target
    spec: ModelSpec
    contract: Contract
    precision: Precision
    graph: onnx.ModelProto
    folder: Path
    files: tuple[Path, ...]
    record: EngineRecord | None = None
    outputs: tuple[str, ...] = ()
    whole: bool = True

    @property
    def stepped_on(self) -> Target:
        """The ONNX Runtime target that its graph is stepped through on."""
        return self.target if self.record is None else parse_target("ort-cpu")


def verify_against_weights(
    engine: EngineUnderTest,
    source: WeightSource,
    cases: Sequence[Case],
    *,
    beside: Sequence[EngineUnderTest] = (),
    record: ReferenceRecorder | None = None,
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Compare with the eager fp32 model that holds the source's weights: local and cumulative errors, by block.

    Args:
        beside: other engines of the same model and precision. Their graphs are compared once per kind of call, which is
            all that can differ, and they are run whole where this machine can.

    Returns:
        The engine's verdict, then those of the engines beside it.

    Raises:
        MachineError: the engine's graph cannot run here.
        CheckpointError: the source cannot be read.
    """
    start = time.perf_counter()
    chain = calls(engine.spec, engine.outputs)
    checks, checks_beside, outputs = stream_parity(
        chain,
        engine.contract,
        EagerCalls(engine.spec, source),
        _engine_calls(engine, chain),
        [case_inputs(case, engine.contract, engine.spec) for case in cases],
        cases,
        TOLERANCES[engine.precision.name],
        beside=[_engine_calls(other, chain) for other in beside],
        record=record,
        progress=progress,
    )
    expected = _Expected(cases, [case_inputs(case, engine.contract, engine.spec) for case in cases], outputs)
    reference = "the eager model in fp32"
    kinds = len({call.kind.function for call in chain})
    stepped = [(engine, checks, f"{len(chain)} calls one by one")]
    stepped += [
        (other, made, f"one call of each of {kinds} kinds") for other, made in zip(beside, checks_beside, strict=True)
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
        tolerance = TOLERANCES[engine.precision.name]
        made = _engine_calls(engine, chain)
        checks = replay_parity(chain, engine.contract, made, inputs, reference, tolerance, progress=progress)
        executed = (_how(engine, f"{len(chain)} calls one by one", reference.cases),)
    count = range(len(reference.cases))
    blocks = [t.name for t in engine.contract.outputs if t.name != "sample"]
    expected = _Expected(
        reference.cases,
        inputs,
        [{"sample": reference.sample(i), **{name: reference.digest(i, name) for name in blocks}} for i in count],
    )
    against = "the eager model in fp32, as recorded in reference.safetensors at export"
    return _verdict(engine, weights, checks, expected, start, against, executed)


@dataclass(frozen=True)
class _Expected:
    """Inputs of the whole engine, and what it should compute, by case."""

    cases: Sequence[Case]
    inputs: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Mapping[str, Tensor]]


def _engine_calls(engine: EngineUnderTest, chain: Sequence[Call]) -> EngineCalls:
    check_wiring(engine.graph, chain)
    dtype = getattr(torch, engine.precision.dtype)
    return EngineCalls(engine.graph, engine.folder, engine.stepped_on.name, dtype)


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
    refusal = _whole_engine_refusal(engine)
    not_executed: tuple[str, ...] = ()
    if refusal is None:
        try:
            checks = checks + _whole_engine(engine, expected)
        except MachineError as error:
            if engine.record is None or not checks:
                raise
            # e.g. no room on the GPU: what took so long to build is not thrown away for that
            refusal = _words(error)
    if refusal is None:
        how = execution_of(engine.target, engine.precision)
        device = f" on {torch.cuda.get_device_name()}" if engine.target.device == "cuda" else ""
        executed = (*executed, f"the whole engine, {len(expected.cases)} cases: {how}{device}")
    elif engine.record is None:
        not_executed = (f"the whole engine in one session: {refusal}",)
    else:
        not_executed = (f"the engine: built, not executed: {refusal}",)
    engine_executed = engine.record is None or refusal is None
    return Verdict(
        bundle=engine.name,
        target=engine.target.name,
        precision=engine.precision.name,
        weights=weights,
        reference=reference,
        executed=executed,
        not_executed=not_executed,
        tolerance=dataclasses.asdict(TOLERANCES[engine.precision.name]),
        checks=tuple(checks),
        seconds=time.perf_counter() - start,
        engine_executed=engine_executed,
        machine=machine_facts() if engine_executed else {},
    )


def _whole_engine(engine: EngineUnderTest, expected: _Expected) -> list[Check]:
    runner = open_runner(engine.target, engine.files, engine.record)
    tolerance = TOLERANCES[engine.precision.name]
    checks = []
    try:
        for case, values, wanted in zip(expected.cases, expected.inputs, expected.outputs, strict=True):
            inputs = {t.name: values[t.name].to(runner.device) for t in engine.contract.inputs}
            sizes = axis_sizes(engine.contract.inputs, list(inputs.values()))
            outputs = {
                t.name: torch.empty(t.shape(sizes), dtype=getattr(torch, t.dtype), device=runner.device)
                for t in engine.contract.outputs
            }
            runner.run(inputs, outputs, sizes)
            checks += [check_output(name, case, outputs[name].cpu(), wanted[name], tolerance) for name in wanted]
    finally:
        runner.close()
    return checks


def _words(error: MachineError) -> str:
    return f"{error.rule}; here: {error.received}"


def _whole_engine_refusal(engine: EngineUnderTest) -> str | None:
    """Why the whole engine is not run here, or None where it can be."""
    if not engine.whole:
        return "left out on request (--blocks-only)"
    if engine.record is not None:
        try:
            check_runs_here(engine.record, engine.target)
        except MachineError as error:
            return _words(error)
        return None
    if engine.target.name != "ort-cpu":
        return None
    numel = sum(p.numel for p in parameters(engine.spec))
    needed, available = ORT_CPU_MEMORY_FACTOR * 4 * numel, available_memory()
    if needed <= available:
        return None
    return f"it needs about {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
