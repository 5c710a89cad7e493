"""The first block that is wrong, and the first node in it, in one block's memory.

The calls of the model are looked at in order, each on equal inputs: the eager model's own, rounded to what the engine
takes. Of each, whatever its outputs' errors, for a fault may be small by the end of a block:

1. the graph: does it read the values and the weights that the call reads, with the model's epsilons?
2. the weights: are their bytes what conversion or quantization of the source gives?
3. the values: is each within tolerance of what the eager operators make of the engine's own values before it?
4. the outputs, of the call as it runs when nothing is brought out of it

and the first call with anything out of line is where it ends.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mmdit_deploy.build import execution_of, stepped_dialect_of
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.planned import PlannedCall
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.errors import GraphError, MachineError
from mmdit_deploy.model import Call, calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.verify.as_planned import Programs
from mmdit_deploy.verify.attributes import wrong_attributes
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.exposed import Body, ExposedCalls
from mmdit_deploy.verify.findings import Bisection, FaultyNode, Finding
from mmdit_deploy.verify.metrics import compare, within
from mmdit_deploy.verify.nodes import Compared, Matching, compare_nodes
from mmdit_deploy.verify.records import Case, Errors
from mmdit_deploy.verify.stored_weights import StoredWeights, WeightDifference
from mmdit_deploy.verify.streaming import last_uses
from mmdit_deploy.verify.under_test import EngineUnderTest
from mmdit_deploy.verify.wiring import miswired

Progress = Callable[[str, int, int], None]


def bisect(
    engine: EngineUnderTest,
    source: WeightSource,
    cases: Sequence[Case],
    *,
    programs: Programs | None = None,
    progress: Progress | None = None,
) -> Bisection:
    """Find the first call of an engine's graph that is wrong, and the first node in it.

    Args:
        source: of the weights that the engine should have.
        cases: inputs; all values of a block are in memory for each in turn.
        programs: traces the kinds of calls; by default `programs_of`.
        progress: called with the call's name, its index and the number of calls.

    Raises:
        MachineError: the engine's graph cannot run here.
        CheckpointError: the source cannot be read.
    """
    start = time.perf_counter()
    chain = calls(engine.spec, engine.outputs)
    traced = (programs or programs_of)(chain, getattr(torch, engine.precision.dtype))
    search = _Search(engine, source, chain, traced)
    values = [case_inputs(case, engine.contract, engine.spec) for case in cases]
    over, found, looked_at = last_uses(chain, engine.contract), None, 0
    for index, call in enumerate(chain):
        if progress is not None:
            progress(call.path, index, len(chain))
        looked_at, found = index + 1, search.look(call, cases, values)
        if found is not None:
            break
        for case in values:
            for name in over[index]:
                del case[name]
    return Bisection(
        bundle=engine.name,
        target=engine.target.name,
        precision=engine.precision.name,
        graph=graph_of(engine),
        weights=source.description,
        calls=looked_at,
        of_calls=len(chain),
        values=search.values,
        worst=search.worst,
        tolerance=dataclasses.asdict(search.tolerance),
        found=found,
        seconds=time.perf_counter() - start,
    )


def graph_of(engine: EngineUnderTest) -> str:
    """Which graph of an engine is stepped through, and on what, in words."""
    bf16 = engine.plan is not None and bool(engine.plan.bf16_attentions)
    dialect = stepped_dialect_of(engine.target, engine.precision, bf16_attentions=bf16)
    return f"the {dialect} graph, {execution_of(engine.stepped_on, engine.precision)}"


def graph_findings(engine: EngineUnderTest, chain: Sequence[Call]) -> Iterator[Finding]:
    """What is wrong in an engine's graph by itself, without running it, in the order of the model."""
    wiring = [(m.reader, f"{m.rule}, and it reads {m.received}") for m in miswired(engine.graph, chain)]
    stored = StoredWeights(engine.folder, engine.spec)
    for call in chain:
        try:
            body = Body.of(engine.graph, call.path)
        except GraphError as error:
            yield Finding(call.path, call.block, call.kind.function, graph=(str(error),))
            continue
        misplaced = [
            f"{name} is read from {place}, not from {', '.join(stored.keys_of(f'{call.path}.{name}'))}"
            for name, place in stored.misplaced(engine.graph, body)
        ]
        attributes = [f"{rule}, and it is {received}" for rule, received in wrong_attributes(body.function)]
        said = (*(text for reader, text in wiring if reader == call.path), *misplaced, *attributes)
        if said:
            yield Finding(call.path, call.block, body.function.name, graph=said)


@dataclass
class _Seen:
    """What was found of one call.

    Args:
        out: values out of tolerance, each with its case.
        errors: of outputs out of tolerance, the worst, with its case.
    """

    out: list[tuple[Case, Compared]] = field(default_factory=list)
    errors: tuple[Case, Errors] | None = None


class _Search:
    """Looks at calls one by one, and counts."""

    def __init__(
        self, engine: EngineUnderTest, source: WeightSource, chain: Sequence[Call], programs: Mapping[str, Program]
    ):
        self._engine, self._programs = engine, programs
        self._plan = engine.plan or PrecisionPlan(engine.precision)
        self._compute: torch.dtype = getattr(torch, engine.precision.dtype)
        self.tolerance = engine.tolerances.step[engine.precision.base]
        self.values, self.worst = 0, 0.0
        target = engine.stepped_on.name
        self._eager = EagerCalls(engine.spec, source)
        self._whole = EngineCalls(engine.graph, engine.folder, target, self._compute)
        self._exposed = ExposedCalls(engine.graph, engine.folder, target)
        self._of_graph = {f.call: f for f in graph_findings(engine, chain)}
        self._stored = StoredWeights(engine.folder, engine.spec)
        self._differences = self._stored.differences(source, self._plan)

    def look(self, call: Call, cases: Sequence[Case], values: Sequence[Values]) -> Finding | None:
        """Look at one call, whose outputs are then added to the values of every case."""
        said = self._of_graph.get(call.path)
        weights = tuple(self._differences.get(call.path, ()))
        try:
            matching = Matching(self._programs[call.kind.function], Body.of(self._engine.graph, call.path))
            seen = self._run(call, matching, cases, values)
        except (GraphError, MachineError):
            if said is None:
                raise
            return dataclasses.replace(said, weights=weights)  # so wrong that it does not run
        if not (said or weights or seen.out or seen.errors):
            return None
        return self._finding(call, matching, said, weights, seen)

    def _run(self, call: Call, matching: Matching, cases: Sequence[Case], values: Sequence[Values]) -> _Seen:
        planned = PlannedCall(
            call.path, matching.program, self._eager.weights(call), self._plan, matching.fp32_inputs(self._plan)
        )
        whole = self._whole.load(call)
        exposed = self._exposed.load(call, set(matching.values.values()))
        names = [t.name for t in call.kind.inputs]
        bound = self._engine.bounds.of_call(call.path)[0]
        seen = _Seen()
        for case, known in zip(cases, values, strict=True):
            inputs = whole.rounded([known[name] for name in call.inputs])
            activations = dict(zip(names, inputs, strict=True))
            expected = planned.run(activations)
            for received, wanted in zip(whole(inputs), expected, strict=True):
                errors = compare(received, wanted)
                if not within(errors, bound) and (seen.errors is None or errors.badness > seen.errors[1].badness):
                    seen.errors = (case, errors)
            wide = self._plan.wide.get(call.path, frozenset())
            compared = compare_nodes(
                matching, planned, activations, exposed(inputs), self._compute, wide, self.tolerance
            )
            seen.out += [(case, one) for one in compared if not one.passed]
            self.values += len(compared)
            self.worst = max([self.worst, *(one.share for one in compared if one.passed)])
            known.update(zip(call.outputs, expected, strict=True))
        return seen

    def _finding(
        self,
        call: Call,
        matching: Matching,
        said: Finding | None,
        weights: tuple[WeightDifference, ...],
        seen: _Seen,
    ) -> Finding:
        order = list(matching.values)
        first = min(seen.out, key=lambda item: order.index(item[1].made_by), default=None)
        wrong = {d.path.removeprefix(f"{call.path}.") for d in weights}
        readers = [n for n in order if wrong & self._reads(matching, matching.values[n])]
        node = None
        if readers and (first is None or order.index(readers[0]) < order.index(first[1].made_by)):
            node = self._described(call, matching, matching.values[readers[0]], readers[0])
        elif first is not None:
            case, compared = first
            node = dataclasses.replace(
                self._described(call, matching, compared.value, compared.made_by),
                case=case,
                errors=compared.errors,
                element=compared.element,
            )
        outside = seen.errors is not None and node is None and said is None
        return Finding(
            call=call.path,
            block=call.block,
            function=matching.body.function.name,
            node=node,
            weights=weights,
            graph=said.graph if said else (),
            case=seen.errors[0] if seen.errors else None,
            errors=seen.errors[1] if seen.errors else None,
            note="no value inside of it is out of tolerance when it is brought out: look at what the runtime fuses"
            if outside
            else "",
        )

    def _reads(self, matching: Matching, value: str) -> set[str]:
        """The weights that the nodes read which make a value, by their names in the function."""
        inputs = set(matching.body.function.input)
        return {v for node in matching.nodes_of(value) for v in node.input if v in inputs}

    def _described(self, call: Call, matching: Matching, value: str, made_by: torch.fx.Node) -> FaultyNode:
        nodes = matching.nodes_of(value)
        made = {out for n in nodes for out in n.output}
        reads = dict.fromkeys(v for n in nodes for v in n.input if v and v not in made)
        parameters = [p for p in (f"{call.path}.{v}" for v in reads) if self._stored.keys_of(p)]
        return FaultyNode(
            value=value,
            ops=tuple(n.op_type for n in nodes if n.op_type not in ("Cast", "Constant")),
            reads=tuple(reads),
            operators=tuple(_operator(n) for n in matching.made_of(made_by) if n.op == "call_function"),
            parameters=tuple(parameters),
            keys=tuple(key for p in parameters for key in self._stored.keys_of(p)),
        )


def _operator(node: torch.fx.Node) -> str:
    """``aten.linear.default`` → ``linear``."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
