"""`--budget rel_l2=…`: the largest part of a plan whose error stays within it, measured as a whole.

What is chosen together is a *choice*: one block's attention projections, one block's MLP, …; all modulations are one,
because one matrix product makes them. Choices are taken in the order of squared error per byte saved: errors of parts
add up about as those of independent noise do, in squares. How many fit is predicted that way, measured, and corrected
until one more is too many. What is returned was measured and holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.calibration.observe import Progress
from mmdit_deploy.calibration.sensitivity import Row, Sensitivity, sensitivity
from mmdit_deploy.calibration.what_if import Distance, Part, effects
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.errors import UsageError
from mmdit_deploy.model import calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import ModelSpec

_GUESSES = 3  # from predictions; after that the range that is left is halved


@dataclass(frozen=True)
class Chosen:
    """The largest part of a plan that was found to stay within a budget.

    Args:
        plan: only with what is quantized.
        budget: the largest relative L2 error of the final output, over all samples.
        error: the measured one, of the worst sample.
        saved: bytes of weights that it saves.
        rows: by block and role, what was measured alone; and of each, whether it is quantized.
        measured: every set that was tried: how many units it had, and its error.
    """

    plan: PrecisionPlan
    budget: float
    error: Distance
    saved: int
    rows: tuple[tuple[Row, bool], ...]
    measured: tuple[tuple[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "budget_rel_l2": self.budget,
            "rel_l2": self.error.rel_l2,
            "cosine": self.error.cosine,
            "saved_bytes": self.saved,
            "units": [{**row.to_json(), "quantized": taken} for row, taken in self.rows],
            "measured": [{"units": units, "rel_l2": error} for units, error in self.measured],
        }

    def text(self) -> str:
        """The table of sensitivities, and below it what was chosen."""
        taken = sum(taken for _, taken in self.rows)
        left = [f"{row.unit.block} {row.unit.role}" for row, taken in self.rows if not taken]
        lines = [
            Sensitivity(tuple(row for row, _ in self.rows)).text(),
            f"{taken} of {len(self.rows)} are quantized: relative L2 {self.error.rel_l2:.2%} of {self.budget:.2%} "
            f"allowed, {self.saved:,} bytes saved",
        ]
        if left:
            lines.append(f"not quantized: {', '.join(left)}")
        return "\n".join(lines)


def parse_budget(text: str) -> float:
    """``rel_l2=0.05`` → 0.05: larger than 0, smaller than 1.

    Raises:
        UsageError: it is something else.
    """
    name, _, value = text.partition("=")
    try:
        budget = float(value)
    except ValueError:
        budget = math.nan
    if name != "rel_l2" or not 0 < budget < 1:
        raise UsageError(
            "a budget is a relative L2 error of the model's output, between 0 and 1",
            received=ascii(text)[:80],
            fix="--budget rel_l2=0.05",
        )
    return budget


def choose(
    spec: ModelSpec,
    source: WeightSource,
    plan: PrecisionPlan,
    samples: Sequence[Mapping[str, Tensor]],
    budget: float,
    *,
    found: Sensitivity | None = None,
    programs: Mapping[str, Program] | None = None,
    progress: Progress | None = None,
) -> Chosen:
    """Choose what of a plan is quantized.

    Args:
        budget: the largest relative L2 error of the final output, of every sample.
        found: what `sensitivity` measured on these samples, where it has.

    Returns:
        A plan whose measured error is within the budget; one that quantizes nothing where nothing else is.
    """
    if programs is None:
        programs = programs_of(calls(spec), getattr(torch, plan.precision.dtype))
    if found is None:
        found = sensitivity(spec, source, plan, samples, programs=programs, progress=progress)
    measured: list[tuple[int, float]] = []

    def measure(choices: Sequence[_Choice]) -> Distance:
        rows = [row for choice in choices for row in choice.rows]
        (effect,) = effects(spec, source, plan, [_joined(rows)], samples, programs=programs, progress=progress)
        error = Distance.worst(effect.output)
        measured.append((len(rows), error.rel_l2))
        return error

    kept, error = _largest(_choices(found.rows), budget, measure)
    rows = {id(row) for choice in kept for row in choice.rows}
    table = tuple((row, id(row) in rows) for row in found.rows)
    taken = [row for row, quantized in table if quantized]
    saved = sum(row.unit.saved for row in taken)
    return Chosen(restricted(plan, _joined(taken)), budget, error, saved, table, tuple(measured))


def restricted(plan: PrecisionPlan, part: Part) -> PrecisionPlan:
    """A plan that quantizes only a part of what another one does."""
    return dataclasses.replace(
        plan,
        linears={path: layer for path, layer in plan.linears.items() if path in part.linears},
        attentions={call: scales for call, scales in plan.attentions.items() if call in part.attentions},
    )


@dataclass(frozen=True)
class _Choice:
    """Units that are quantized together or not at all."""

    rows: tuple[Row, ...]

    @property
    def square(self) -> float:
        """Of the error that is predicted."""
        squares = [row.output.rel_l2**2 for row in self.rows]
        return math.inf if any(map(math.isnan, squares)) else sum(squares)

    @property
    def price(self) -> tuple[float, float]:
        """Squared error per byte; of what saves none, the error alone."""
        saved = sum(row.unit.saved for row in self.rows)
        return (self.square / saved if saved > 0 else math.inf), self.square


def _choices(rows: Sequence[Row]) -> list[_Choice]:
    """All, cheapest first."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        key = row.unit.role if row.unit.role == "modulation" else f"{row.unit.block} {row.unit.role}"
        together.setdefault(key, []).append(row)
    return sorted((_Choice(tuple(rows)) for rows in together.values()), key=lambda choice: choice.price)


def _largest(
    order: Sequence[_Choice], budget: float, measure: Callable[[Sequence[_Choice]], Distance]
) -> tuple[list[_Choice], Distance]:
    """The longest run of the cheapest choices whose measured error is within the budget, and what still fits then."""
    predicted = [math.sqrt(square) for square in accumulate(choice.square for choice in order)]
    holds, fails, error, factor = 0, len(order) + 1, Distance(0.0, 1.0), 1.0
    tries = 0
    while fails - holds > 1:
        guess = bisect_right(predicted, budget / factor) if tries < _GUESSES else (holds + fails) // 2
        count = min(max(guess, holds + 1), fails - 1)
        found = measure(order[:count])
        if found.rel_l2 <= budget:
            holds, error = count, found
        else:
            fails = count
        if 0 < predicted[count - 1] < math.inf and 0 < found.rel_l2 < math.inf:
            factor = found.rel_l2 / predicted[count - 1]
        tries += 1
    kept, rest = list(order[:holds]), _fitting(order[holds + 1 :], (budget / factor) ** 2 - _total(order[:holds]))
    if rest and (found := measure([*kept, *rest])).rel_l2 <= budget:
        return [*kept, *rest], found
    return kept, error


def _fitting(order: Sequence[_Choice], room: float) -> list[_Choice]:
    """Those whose predicted squares fit into what is left."""
    fitting: list[_Choice] = []
    for choice in order:
        if choice.square + _total(fitting) <= room:
            fitting.append(choice)
    return fitting


def _total(choices: Sequence[_Choice]) -> float:
    return sum(choice.square for choice in choices)


def _joined(rows: Sequence[Row]) -> Part:
    return functools.reduce(operator.or_, (row.unit.part for row in rows), Part())
