"""A call in fp16 with islands of fp32, emulated: operators compute in fp32, and what is in fp16 is rounded to it.

As a runtime does that accumulates in fp32 and rounds what it writes. What fp16 cannot hold becomes infinite here too,
and what is smaller than its subnormal numbers becomes zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mmdit_deploy.calibration.fp16_ranges import factor_of
from mmdit_deploy.calibration.graph_values import GraphValues
from mmdit_deploy.eager.calls import Values
from mmdit_deploy.graph.precision.wide_values import Islands, decide


@dataclass(frozen=True)
class Bound:
    """How far something may be from the eager model in fp32.

    Args:
        min_cosine: least cosine similarity, over all elements of a tensor.
        max_rel_l2: largest ‖x − reference‖ / ‖reference‖.
    """

    min_cosine: float
    max_rel_l2: float

    def share(self, share: float) -> Bound:
        """A part of what is allowed."""
        return Bound(1 - (1 - self.min_cosine) * share, self.max_rel_l2 * share)


@dataclass(frozen=True)
class Error:
    """How far something is from the eager model in fp32; infinitely, where it is NaN or Inf."""

    cosine: float
    rel_l2: float

    def within(self, bound: Bound) -> bool:
        """Whether it keeps both bounds."""
        return self.cosine >= bound.min_cosine and self.rel_l2 <= bound.max_rel_l2

    def over(self, bound: Bound) -> float:
        """How many times the bound it is: the larger of the two."""
        if not math.isfinite(self.rel_l2):
            return math.inf
        return max((1 - self.cosine) / (1 - bound.min_cosine), self.rel_l2 / bound.max_rel_l2)


NONE = Error(1.0, 0.0)
LOST = Error(0.0, math.inf)


def error_of(received: Tensor, reference: Tensor) -> Error:
    """Compare a tensor with its reference, of the same shape."""
    a, b = received.double().flatten(), reference.double().flatten()
    if not bool(a.isfinite().all()):
        return LOST
    norm_a, norm_b, distance = float(a.norm()), float(b.norm()), float((a - b).norm())
    if norm_b == 0:
        return NONE if norm_a == 0 else LOST
    return Error(float(a @ b) / (norm_a * norm_b) if norm_a else 0.0, distance / norm_b)


def worst(errors: Sequence[Error]) -> Error:
    """The largest distance and the least similarity."""
    return Error(min(e.cosine for e in errors), max(e.rel_l2 for e in errors)) if errors else NONE


class Fp16Call:
    """One call with its weights, to be computed with this or that in fp32.

    Attributes:
        overflowed: values, or factors of products, that fp16 could not hold in any run, by name in the function.

    Args:
        places: of its kind.
        weights: parameters in fp32, by name in the module.
    """

    def __init__(self, places: GraphValues, weights: Mapping[str, Tensor]):
        self._places = places
        self._exact = weights
        self.overflowed: set[str] = set()
        self._weights = {name: rounded(weight) for name, weight in weights.items()}

    def exact(self, activations: Values) -> tuple[Tensor, ...]:
        """Compute it in fp32, as the eager model does."""
        return self._places.program.run(activations, self._exact)

    def islands(self, wide: Collection[str]) -> Islands:
        """What is fp32 when these values are."""
        return decide(self._places.function, wide)

    def __call__(self, activations: Values, islands: Islands) -> tuple[Tensor, ...]:
        """Compute it.

        Args:
            activations: by name; those that are not fp32 in the islands are rounded first.
        """
        places, computed = self._places, {v.name for v in self._places.function.inputs if v in islands.values}
        given = {
            name: t if name in computed or not _is_16_bit(places, name) else rounded(t)
            for name, t in activations.items()
        }

        def tap(operator: fx.Node, value: Tensor) -> Tensor:
            made, holder = places.values.get(operator.name), places.inside.get(operator.name)
            if made is not None and made not in islands.values:
                return self._rounded(value, made.name or "")
            if holder is not None and holder not in islands.nodes:
                return self._rounded(value, factor_of(holder))
            return value

        def attend(operator: fx.Node, arguments: Sequence[Any]) -> Tensor | None:
            attention = places.attentions.get(operator.name)
            if attention is None or attention not in islands.bf16:
                return None
            kwargs = {name: _through_bf16(value) for name, value in operator.kwargs.items()}
            made: Tensor = operator.target(*map(_through_bf16, arguments), **kwargs)  # type: ignore[operator]
            return _through_bf16(made)

        return places.program.run(given, self._weights, tap=tap, replace=attend)

    def _rounded(self, value: Tensor, name: str) -> Tensor:
        made = rounded(value)
        if made.isinf().any() and value.isfinite().all():
            self.overflowed.add(name)
        return made


def rounded(value: Tensor) -> Tensor:
    """Through fp16; what is no float stays."""
    return value.half().float() if value.is_floating_point() else value


def _through_bf16(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_16_bit(places: GraphValues, name: str) -> bool:
    value = places.named(name)
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT16"
