"""A quantized engine beside the eager model *as planned*, node by node: what its own tolerance would hide.

Quantized to 4 bits, a block may be off by a fifth of its output, and a swapped scale and shift, or a dropped gate, may
well be less. Against the eager model that quantizes the same way, the compute type's tolerance binds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.eager.planned import PlannedCall
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.model import Call, calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.exposed import Body, ExposedCalls
from mmdit_deploy.verify.nodes import Compared, Matching, compare_nodes
from mmdit_deploy.verify.records import Case, Check
from mmdit_deploy.verify.streaming import last_uses
from mmdit_deploy.verify.under_test import EngineUnderTest

Programs = Callable[[Sequence[Call], torch.dtype], Mapping[str, Program]]


def check_as_planned(
    engine: EngineUnderTest, source: WeightSource, cases: Sequence[Case], programs: Programs | None = None
) -> list[Check]:
    """Compare every value inside of every call, on equal inputs.

    Args:
        cases: two of them, unlike, are enough for what is inside of calls; see `unlike`.
        programs: traces the kinds of calls; by default `programs_of`.

    Returns:
        The worst value of each call and case, in the order of the model.

    Raises:
        MachineError: the engine's graph cannot run here.
    """
    chain = calls(engine.spec, engine.outputs)
    compute: torch.dtype = getattr(torch, engine.precision.dtype)
    plan, target = engine.plan or PrecisionPlan(engine.precision), engine.stepped_on.name
    traced, eager = (programs or programs_of)(chain, compute), EagerCalls(engine.spec, source)
    whole = EngineCalls(engine.graph, engine.folder, target, compute)
    exposed = ExposedCalls(engine.graph, engine.folder, target)
    tolerance, over = engine.tolerances.step[engine.precision.base], last_uses(chain, engine.contract)
    values = [case_inputs(case, engine.contract, engine.spec) for case in cases]
    checks = []
    for index, call in enumerate(chain):
        matching = Matching(traced[call.kind.function], Body.of(engine.graph, call.path))
        planned = PlannedCall(call.path, matching.program, eager.weights(call), plan)
        rounds, inside = whole.load(call), exposed.load(call, set(matching.values.values()))
        wide = plan.wide.get(call.path, frozenset())
        for case, known in zip(cases, values, strict=True):
            inputs = rounds.rounded([known[name] for name in call.inputs])
            given = {t.name: value for t, value in zip(call.kind.inputs, inputs, strict=True)}
            compared = compare_nodes(matching, planned, given, inside(inputs), compute, wide, tolerance)
            checks.append(_check(call, case, compared, engine))
            known.update(zip(call.outputs, planned.run(given), strict=True))
            for name in over[index]:
                del known[name]
    return checks


def unlike(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Two of them that differ in shape and in timestep, where there are such."""
    first = cases[0]
    others = [c for c in cases if c.img_tokens != first.img_tokens and c.timestep != first.timestep]
    return (first, *others[:1])


def _check(call: Call, case: Case, compared: Sequence[Compared], engine: EngineUnderTest) -> Check:
    """The first value out of tolerance, or the one that is nearest to it."""
    worst = next((one for one in compared if not one.passed), None)
    worst = worst or max(compared, key=lambda one: one.errors.rel_l2 / one.max_rel_l2)
    passed = all(one.passed for one in compared)
    return Check(call.path, "nodes", case, worst.errors, True, passed, bound_by=engine.precision.base)
