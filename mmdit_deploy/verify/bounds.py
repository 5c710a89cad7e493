"""Which tolerance binds which call of a model.

In a quantized model, only what holds something quantized may err as quantized models do. Its other calls are in the
compute type, and are bound as in a model of that type: a wrong timestep embedding hides behind no FP4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mmdit_deploy.model.partition import call_of
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.spec import Precision
from mmdit_deploy.verify.tolerances import DEFAULTS, ImageTolerance, Tolerance, Tolerances


@dataclass(frozen=True)
class Bounds:
    """The tolerances of one model.

    Args:
        precision: the model's.
        plan: what is quantized in it; without one, all that a quantized precision could be.
        tolerances: of all precisions.
    """

    precision: Precision
    plan: PrecisionPlan | None = None
    tolerances: Tolerances = field(default=DEFAULTS)

    @property
    def step(self) -> Tolerance:
        """Of the final output, and of calls that hold something quantized."""
        return self.tolerances.step[self.precision.name]

    @property
    def trajectory(self) -> Tolerance:
        """Of the latent after the last sampling step."""
        return self.tolerances.trajectory[self.precision.name]

    @property
    def image(self) -> ImageTolerance:
        """Of the image."""
        return self.tolerances.image[self.precision.name]

    def of_call(self, path: str) -> tuple[Tolerance, str | None]:
        """The tolerance of a call's own error, and its name in `named`; None for that of the step."""
        if self._in_compute_type(path):
            return self.tolerances.step[self.precision.base], self.precision.base
        return self.step, None

    @property
    def named(self) -> dict[str, dict[str, Any]]:
        """Every tolerance but that of the step, by the name that checks give."""
        named: dict[str, Tolerance | ImageTolerance] = {"trajectory": self.trajectory, "image": self.image}
        if self.precision.quantized and self.plan is not None:
            named[self.precision.base] = self.tolerances.step[self.precision.base]
        return {name: as_json(tolerance) for name, tolerance in named.items()}

    def _in_compute_type(self, path: str) -> bool:
        if not self.precision.quantized or self.plan is None:
            return False
        quantized = {call_of(linear) for linear in self.plan.linears} | set(self.plan.attentions)
        return path not in quantized


def as_json(tolerance: Tolerance | ImageTolerance) -> dict[str, Any]:
    """A tolerance as verdicts hold it: the bounds that it has, and the reason."""
    return {key: value for key, value in dataclasses.asdict(tolerance).items() if value is not None}
