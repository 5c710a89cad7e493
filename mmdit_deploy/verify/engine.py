"""Verify one engine: call by call, and whole where memory allows, with a verdict at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.build import execution_of
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.contract import Contract
from mmdit_deploy.model import Call, calls
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.spec import ModelSpec, Precision
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.chains import EagerCalls, EngineCalls, axis_sizes
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
    """What is verified: the engine's graph beside its weights, and what it should be.

    Args:
        name: the bundle's.
        graph: the lowered graph's file, in the folder of its weights.
        target: e.g. ``ort-cpu``.
        outputs: block outputs that the graph exposes besides ``sample``.
        whole: also run the whole engine in one session, where memory allows.
    """

    name: str
    graph: Path
    target: str
    spec: ModelSpec
    contract: Contract
    precision: Precision
    outputs: tuple[str, ...] = ()
    whole: bool = True


def verify_against_weights(
    engine: EngineUnderTest,
    source: WeightSource,
    cases: Sequence[Case],
    *,
    record: ReferenceRecorder | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare with the eager fp32 model that holds the source's weights: local and cumulative errors, by block.

    Raises:
        MachineError: the engine cannot run here.
        CheckpointError: the source cannot be read.
    """
    start = time.perf_counter()
    tolerance = TOLERANCES[engine.precision.name]
    chain = calls(engine.spec, engine.outputs)
    checks, outputs = stream_parity(
        chain,
        engine.contract,
        EagerCalls(engine.spec, source),
        _engine_calls(engine, chain),
        cases,
        tolerance,
        record=record,
        progress=progress,
    )
    inputs = [case_inputs(case, engine.contract) for case in cases]
    return _verdict(
        engine, source.description, checks, cases, inputs, outputs, start, "the eager model in fp32"
    )


def verify_against_reference(
    engine: EngineUnderTest, weights: str, reference: Reference, *, progress: Progress | None = None
) -> Verdict:
    """Compare with what the eager model computed at export: no checkpoint needed.

    Args:
        weights: where the weights came from, as the manifest says.

    Raises:
        MachineError: the engine cannot run here.
    """
    start = time.perf_counter()
    chain = calls(engine.spec, engine.outputs)
    tolerance = TOLERANCES[engine.precision.name]
    checks = replay_parity(
        chain, engine.contract, _engine_calls(engine, chain), reference, tolerance, progress=progress
    )
    count = range(len(reference.cases))
    inputs = [reference.inputs(i) for i in count]
    blocks = [t.name for t in engine.contract.outputs if t.name != "sample"]
    outputs = [
        {"sample": reference.sample(i), **{name: reference.digest(i, name) for name in blocks}} for i in count
    ]
    source = "the eager model in fp32, as recorded in reference.safetensors at export"
    return _verdict(engine, weights, checks, reference.cases, inputs, outputs, start, source)


def _engine_calls(engine: EngineUnderTest, chain: Sequence[Call]) -> EngineCalls:
    engine_calls = EngineCalls(engine.graph, engine.target, getattr(torch, engine.precision.dtype))
    check_wiring(engine_calls.model, chain)
    return engine_calls


def _verdict(
    engine: EngineUnderTest,
    weights: str,
    checks: list[Check],
    cases: Sequence[Case],
    inputs: Sequence[Mapping[str, Tensor]],
    outputs: Sequence[Mapping[str, Tensor]],
    start: float,
    reference: str,
) -> Verdict:
    how = execution_of(engine.target, engine.precision)
    executed = [f"{len(calls(engine.spec))} calls one by one, {len(cases)} cases: {how}"]
    not_executed = []
    refusal = _whole_engine_refusal(engine)
    if refusal:
        not_executed.append(f"the whole engine in one session: {refusal}")
    else:
        checks = checks + _whole_engine(engine, cases, inputs, outputs)
        executed.append(f"the whole engine in one session, {len(cases)} cases: {how}")
    return Verdict(
        bundle=engine.name,
        target=engine.target,
        precision=engine.precision.name,
        weights=weights,
        reference=reference,
        executed=tuple(executed),
        not_executed=tuple(not_executed),
        tolerance=dataclasses.asdict(TOLERANCES[engine.precision.name]),
        checks=tuple(checks),
        seconds=time.perf_counter() - start,
    )


def _whole_engine(
    engine: EngineUnderTest,
    cases: Sequence[Case],
    inputs: Sequence[Mapping[str, Tensor]],
    outputs: Sequence[Mapping[str, Tensor]],
) -> list[Check]:
    session = open_session(engine.graph, engine.target)
    tolerance = TOLERANCES[engine.precision.name]
    checks = []
    for case, values, expected in zip(cases, inputs, outputs, strict=True):
        sizes = axis_sizes(engine.contract.inputs, [values[t.name] for t in engine.contract.inputs])
        wanted = [(t.name, getattr(torch, t.dtype), t.shape(sizes)) for t in engine.contract.outputs]
        results = run_session(session, values, wanted)
        checks += [check_output(name, case, results[name], expected[name], tolerance) for name in expected]
    return checks


def _whole_engine_refusal(engine: EngineUnderTest) -> str | None:
    """Why the whole engine is not run here, or None where it fits."""
    if not engine.whole:
        return "left out on request (--blocks-only)"
    if engine.target != "ort-cpu":
        return None
    numel = sum(p.numel for p in parameters(engine.spec))
    needed, available = ORT_CPU_MEMORY_FACTOR * 4 * numel, available_memory()
    if needed <= available:
        return None
    return f"it needs about {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
