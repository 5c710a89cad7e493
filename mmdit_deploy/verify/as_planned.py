"""A quantized engine beside the eager model *as planned*, node by node: what its own tolerance would hide.

Quantized to 4 bits, a block may be off by a fifth of its output, and a swapped scale and shift, or a dropped gate, may
well be less. Against the eager model that quantizes the same way, the compute type's tolerance binds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.planned import PlannedCall
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.errors import GraphError
from mmdit_deploy.model import Call, calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.exposed import Body, ExposedCalls
from mmdit_deploy.verify.nodes import Compared, Matching, compare_nodes
from mmdit_deploy.verify.records import Case, Check
from mmdit_deploy.verify.streaming import Progress, first_calls, last_uses
from mmdit_deploy.verify.tolerances import bounds_of
from mmdit_deploy.verify.under_test import EngineUnderTest

Programs = Callable[[Sequence[Call], torch.dtype], Mapping[str, Program]]


def check_as_planned(
    engine: EngineUnderTest,
    source: WeightSource,
    cases: Sequence[Case],
    programs: Programs | None = None,
    *,
    beside: Sequence[EngineUnderTest] = (),
    progress: Progress | None = None,
) -> list[list[Check]]:
    """Compare every value inside of every call, on equal inputs.

    Args:
        cases: two of them, unlike, are enough for what is inside of calls; see `unlike`.
        programs: traces the kinds of calls; by default `programs_of`.
        beside: other engines of the same model and plan. Of each graph, the first call of every function is compared.
        progress: called with the call's name, its index and the number of calls.

    Returns:
        The worst value of each call and case, in the order of the model: of the engine, then of each beside.

    Raises:
        MachineError: a graph cannot run here.
        GraphError: a call has no value that can be compared.
    """
    chain = calls(engine.spec, engine.outputs)
    compute: torch.dtype = getattr(torch, engine.precision.dtype)
    plan = engine.plan or PrecisionPlan(engine.precision)
    traced, eager = (programs or programs_of)(chain, compute), EagerCalls(engine.spec, source)
    first = _Stepped(engine, {call.path for call in chain})
    others = [_Stepped(other, first_calls(other.graph, chain)) for other in beside]
    values = [case_inputs(case, engine.contract, engine.spec) for case in cases]
    over, checks = last_uses(chain, engine.contract), [list[Check]() for _ in (first, *others)]
    for index, call in enumerate(chain):
        if progress is not None:
            progress(f"{call.path}, node by node", index, len(chain))
        program, weights = traced[call.kind.function], eager.weights(call)
        outputs: list[Sequence[Tensor]] = []
        for stepped, made in zip((first, *others), checks, strict=True):
            if call.path in stepped.paths:
                found, computed = stepped.look(call, program, weights, plan, cases, values)
                made += found
                outputs = outputs or computed
        for known, computed_of_case in zip(values, outputs, strict=True):
            known.update(zip(call.outputs, computed_of_case, strict=True))
            for name in over[index]:
                del known[name]
    return checks


class _Stepped:
    """A graph whose calls are looked at one by one.

    Args:
        paths: of the calls that are.
    """

    def __init__(self, engine: EngineUnderTest, paths: Collection[str]):
        self._engine, self.paths = engine, paths
        self._compute: torch.dtype = getattr(torch, engine.precision.dtype)
        self._tolerance = engine.tolerances.step[engine.precision.base]
        target = engine.stepped_on.name
        self._whole = EngineCalls(engine.graph, engine.folder, target, self._compute)
        self._exposed = ExposedCalls(engine.graph, engine.folder, target)

    def look(
        self,
        call: Call,
        program: Program,
        weights: Mapping[str, Tensor],
        plan: PrecisionPlan,
        cases: Sequence[Case],
        values: Sequence[Values],
    ) -> tuple[list[Check], list[Sequence[Tensor]]]:
        """The check of each case, and what the eager model as planned computes, by case."""
        matching = Matching(program, Body.of(self._engine.graph, call.path))
        planned = PlannedCall(call.path, program, weights, plan, matching.fp32_inputs(plan))
        rounds, inside = self._whole.load(call), self._exposed.load(call, set(matching.values.values()))
        wide = plan.wide.get(call.path, frozenset())
        checks, outputs = [], list[Sequence[Tensor]]()
        for case, known in zip(cases, values, strict=True):
            inputs = rounds.rounded([known[name] for name in call.inputs])
            given = {t.name: value for t, value in zip(call.kind.inputs, inputs, strict=True)}
            compared = compare_nodes(matching, planned, given, inside(inputs), self._compute, wide, self._tolerance)
            checks.append(_check(call, case, compared, self._engine))
            outputs.append(planned.run(given))
        return checks, outputs


def unlike(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Two of them that differ in shape and in timestep, where there are such."""
    first = cases[0]
    others = [c for c in cases if c.img_tokens != first.img_tokens and c.timestep != first.timestep]
    return (first, *others[:1])


def _check(call: Call, case: Case, compared: Sequence[Compared], engine: EngineUnderTest) -> Check:
    """The first value out of tolerance, or the one that is nearest to it.

    Raises:
        GraphError: there is no value to compare.
    """
    if not compared:
        raise GraphError(
            f"the function of {call.path} makes values of the model's operators",
            received="none that has one's name",
            fix="export the bundle again",
        )
    worst = next((one for one in compared if not one.passed), None) or max(compared, key=lambda one: one.share)
    named = engine.tolerances.step[engine.precision.base]
    wider = {key: value for key, value in bounds_of(worst.bound).items() if value != getattr(named, key)}
    return Check(
        call.path,
        "nodes",
        case,
        worst.errors,
        binding=True,
        passed=all(one.passed for one in compared),
        bound_by=engine.precision.base,
        value=worst.value,
        bounds=wider or None,
    )
