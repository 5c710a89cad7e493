"""What a bisection found: the first block out of tolerance, and the first node in it. Plain data, and words for it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mmdit_deploy.verify.records import Case, Errors
from mmdit_deploy.verify.stored_weights import WeightDifference


@dataclass(frozen=True)
class Element:
    """One element of a value: where it is, the engine's and the eager model's."""

    index: tuple[int, ...]
    received: float
    expected: float

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.index))}] is {self.received:.6g}, the eager model's {self.expected:.6g}"


@dataclass(frozen=True)
class FaultyNode:
    """The first node of a call that is wrong.

    Args:
        value: that it makes, by its name in the graph's function.
        ops: the graph's nodes that make it of right values, e.g. ``("FusedMatMul", "Add")``.
        reads: what they read: values of the function, weights by their names in it.
        operators: what the eager model computes there, e.g. ``("linear",)``.
        parameters: weights that are read there, by path in the model.
        keys: their keys in the weights file.
        case: the input; None where the value was not out of tolerance on any, and its weights are the fault.
        errors: on that input, of the engine's value against the eager operators on the engine's own values.
        element: the first that is off.
    """

    value: str
    ops: tuple[str, ...]
    reads: tuple[str, ...]
    operators: tuple[str, ...]
    parameters: tuple[str, ...]
    keys: tuple[str, ...]
    case: Case | None = None
    errors: Errors | None = None
    element: Element | None = None

    def __str__(self) -> str:
        text = f"node {self.value} = {' + '.join(self.ops) or 'nothing'}"
        if self.parameters:
            text += f" with {', '.join(self.parameters)}"
        return text


@dataclass(frozen=True)
class Finding:
    """The first call of a model that is wrong, and how.

    Args:
        call: its path, e.g. ``blocks.3`` or ``modulations.3.img``.
        block: the block that it is, or makes the modulation of; None for what no block has to itself.
        function: that it calls in the graph.
        node: the first of its nodes that is wrong; None where the fault is not inside it.
        weights: its tensors in the weights file that are not the source's.
        graph: what the graph itself says wrong: which value or weight is read, an epsilon; in words.
        case, errors: of the worst output out of tolerance on equal inputs; None where all are within.
        note: what else there is to know, in words.
    """

    call: str
    block: str | None
    function: str
    node: FaultyNode | None = None
    weights: tuple[WeightDifference, ...] = ()
    graph: tuple[str, ...] = ()
    case: Case | None = None
    errors: Errors | None = None
    note: str = ""

    def __str__(self) -> str:
        where = self.call if self.block in (None, self.call) else f"{self.call}, of {self.block}"
        lines = [f"{where}: {self.node}" if self.node else where]
        lines += [f"  the graph: {said}" for said in self.graph]
        if self.node and self.node.errors:
            lines.append(f"  {_figures(self.node.errors)} ({self.node.case})")
            lines += [f"  {self.node.element}"] if self.node.element else []
            operators, reads = ", ".join(self.node.operators), ", ".join(self.node.reads)
            lines.append(f"  the eager model computes {operators} there; the graph reads {reads}")
        lines += [f"  {difference}" for difference in self.weights]
        if self.errors:
            lines.append(f"  the call's output: {_figures(self.errors)} ({self.case})")
        lines += [f"  {self.note}"] if self.note else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Bisection:
    """The outcome of looking for the first thing that is wrong in an engine.

    Args:
        bundle, target, precision: what was looked at.
        graph: the dialect that was stepped through, and on what.
        weights: the source's description; None where there was none, and only recorded elements were compared.
        calls: of the model, how many were looked at, in order.
        of_calls: how many there are.
        values: how many values inside of calls were compared.
        worst: the largest rel-L2 among those that were within tolerance, as a share of what is allowed there.
        tolerance: the bounds of values.
        found: the first call that is wrong; None in a healthy model.
        seconds: wall time.
    """

    bundle: str
    target: str
    precision: str
    graph: str
    weights: str | None
    calls: int
    of_calls: int
    values: int
    worst: float
    tolerance: dict[str, Any]
    found: Finding | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; NaN and infinity become None."""
        return {"healthy": self.found is None, **_finite(dataclasses.asdict(self))}

    def text(self) -> str:
        """For people."""
        head = f"{self.bundle}, {self.target}, {self.precision}: "
        what = "recorded values" if self.weights is None else "values inside of them"
        allowed = f"rel-L2 up to {self.worst:.0%} of what is allowed, {self.tolerance['max_rel_l2']:g}"
        looked = f"{self.calls} of {self.of_calls} calls, {self.values} {what} ({allowed}), on {self.graph}"
        if self.found is not None:
            return f"{head}the first thing wrong is in {self.found}\n  looked at: {looked}"
        weights = "" if self.weights is None else f"\n  every weight is what {self.weights} gives"
        return f"{head}nothing is wrong\n  {looked}{weights}"


def _figures(errors: Errors) -> str:
    if errors.nonfinite:
        return f"{errors.nonfinite} NaN or Inf"
    return f"rel-L2 {errors.rel_l2:.2e}, cosine {errors.cosine:.6f}, largest difference {errors.max_abs:.2e}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
