"""Parity, call by call, in the memory of one block: the first block out of tolerance is known by name.

For each call and case: the *local* error (the engine and the eager call on equal inputs) and the *cumulative* error
(each side fed by its own chain). The tolerance binds local errors and the final output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import torch
from torch import Tensor

from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.model import Call
from mmdit_deploy.verify.bounds import Bounds
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.metrics import compare, within
from mmdit_deploy.verify.noise_floor import FloorChain
from mmdit_deploy.verify.records import Case, Check, Level
from mmdit_deploy.verify.reference import Reference, ReferenceRecorder, pick
from mmdit_deploy.verify.tolerances import Tolerance

Progress = Callable[[str, int, int], None]


def stream_parity(
    calls: Sequence[Call],
    contract: Contract,
    eager: EagerCalls,
    engine: EngineCalls,
    inputs: Sequence[Values],
    cases: Sequence[Case],
    bounds: Bounds,
    *,
    beside: Sequence[EngineCalls] = (),
    floors: Sequence[FloorChain] = (),
    record: ReferenceRecorder | None = None,
    progress: Progress | None = None,
) -> tuple[list[Check], list[list[Check]], list[Values]]:
    """Compare the engine with the eager model in lockstep.

    Args:
        calls: the model's, in order.
        contract: of the engine: its compute type is what inputs are rounded to.
        inputs: of the model, for each case.
        beside: other graphs of the model, of the same compute type. Of each, the first call of every function is
            compared on equal inputs: of `first_calls`.
        floors: measured on the way.
        record: keeps what the eager model computes, so that a later run needs no checkpoint.
        progress: called with the call's name, its index and the number of calls.

    Returns:
        The checks in the order of the model, those of each graph beside, and the eager model's outputs (of the
        contract) for each case.
    """
    compute = getattr(torch, contract.outputs[0].dtype)
    theirs: list[Values] = [dict(values) for values in inputs]
    ours: list[Values] = [dict(values) for values in theirs]
    if record is not None:
        record.inputs(theirs)
    last_use = last_uses(calls, contract)
    checks: list[Check] = []
    checks_beside: list[list[Check]] = [[] for _ in beside]
    firsts = [first_calls(other.graph, calls) for other in beside]
    for index, call in enumerate(calls):
        if progress is not None:
            progress(call.path, index, len(calls))
        eager_call, engine_call = eager.load(call), engine.load(call)
        calls_beside = [
            (made, other.load(call))
            for made, other, first in zip(checks_beside, beside, firsts, strict=True)
            if call.path in first
        ]
        for floor in floors:
            floor.load(call, eager_call)
        for i, case in enumerate(cases):
            exact = [theirs[i][name] for name in call.inputs]
            expected = eager_call(exact)
            rounded = engine_call.rounded(exact)
            # In fp32 the rounded inputs are the exact ones, and one eager run serves both comparisons.
            reference = expected if compute == torch.float32 else eager_call(rounded)
            checks.append(_check(call, "local", case, engine_call(rounded), reference, bounds))
            for made, other in calls_beside:
                made.append(_check(call, "local", case, other(rounded), reference, bounds))
            chained = engine_call([ours[i][name] for name in call.inputs])
            level: Level = "output" if call is calls[-1] else "cumulative"
            checks.append(_check(call, level, case, chained, expected, bounds))
            for floor in floors:
                floor.measure(i, rounded, reference, expected, last_use[index])
            theirs[i].update(zip(call.outputs, expected, strict=True))
            ours[i].update(zip(call.outputs, chained, strict=True))
            if record is not None:
                record.outputs(i, call.outputs, expected)
            for values in (theirs[i], ours[i]):
                for name in last_use[index]:
                    del values[name]
        del eager_call, engine_call, calls_beside  # the next call's weights replace these
        for floor in floors:
            floor.load(None)
    return checks, checks_beside, [{t.name: values[t.name] for t in contract.outputs} for values in theirs]


def replay_parity(
    calls: Sequence[Call],
    contract: Contract,
    engine: EngineCalls,
    inputs: Sequence[Values],
    reference: Reference,
    bounds: Bounds,
    *,
    progress: Progress | None = None,
) -> list[Check]:
    """Compare the engine with what was recorded of the eager model: no checkpoint needed.

    What reads nothing but inputs and conditioning is compared on the recorded ones, and the tolerance binds it.
    Blocks are fed by the engine's own chain: their errors are cumulative. Both are taken over the recorded elements;
    the final output is compared whole.

    Args:
        inputs: those of each recorded case.
    """
    compute = getattr(torch, contract.outputs[0].dtype)
    values = [dict(case) for case in inputs]
    exact = [{**inputs, "conditioning": reference.conditioning(i).to(compute)} for i, inputs in enumerate(values)]
    last_use = last_uses(calls, contract)
    checks: list[Check] = []
    for index, call in enumerate(calls):
        if progress is not None:
            progress(call.path, index, len(calls))
        engine_call = engine.load(call)
        for i, case in enumerate(reference.cases):
            out = engine_call([values[i][name] for name in call.inputs])
            values[i].update(zip(call.outputs, out, strict=True))
            if call is calls[-1]:
                checks.append(_check(call, "output", case, out, (reference.sample(i),), bounds))
            else:
                local = all(name in exact[i] for name in call.inputs)
                alone = engine_call([exact[i][name] for name in call.inputs]) if local else out
                level: Level = "local" if local else "cumulative"
                expected = [reference.digest(i, name) for name in call.outputs]
                checks.append(_check(call, level, case, [pick(t) for t in alone], expected, bounds))
            for name in last_use[index]:
                del values[i][name]
        del engine_call
    return checks


def check_output(name: str, case: Case, received: Tensor, expected: Tensor, tolerance: Tolerance) -> Check:
    """Compare one output of the whole engine. `expected` may be a digest of it."""
    errors = compare(received if received.shape == expected.shape else pick(received), expected)
    return Check(name, "engine", case, errors, binding=True, passed=within(errors, tolerance))


def _check(
    call: Call,
    level: Level,
    case: Case,
    received: Sequence[Tensor],
    expected: Sequence[Tensor],
    bounds: Bounds,
) -> Check:
    """The worse of a call's outputs."""
    errors = max((compare(r, e) for r, e in zip(received, expected, strict=True)), key=lambda e: e.badness)
    tolerance, name = bounds.of_call(call.path) if level == "local" else (bounds.step, None)
    binding = level != "cumulative"
    passed = within(errors, tolerance) if binding else errors.nonfinite == 0
    return Check("sample" if level == "output" else call.path, level, case, errors, binding, passed, name)


def first_calls(model: onnx.ModelProto, calls: Sequence[Call]) -> frozenset[str]:
    """Of every function of a graph, the path of the first call that calls it; calls of one function differ in values.

    Calls of one kind may call several: variants, by what the plan quantizes in them, or keeps in fp32.
    """
    called = {node.name: node.op_type for node in model.graph.node}
    return frozenset({called.get(call.path, call.kind.function): call.path for call in reversed(calls)}.values())


def last_uses(calls: Sequence[Call], contract: Contract) -> list[list[str]]:
    """By call, the values that no later call reads; what the graph returns is kept."""
    last: dict[str, int] = {}
    for index, call in enumerate(calls):
        for name in (*call.inputs, *call.outputs):
            last[name] = index
    for output in contract.outputs:
        last.pop(output.name)
    return [[name for name, at in last.items() if at == index] for index in range(len(calls))]
