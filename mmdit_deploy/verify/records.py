"""What verification found, as plain data: reports, manifests and exit statuses derive from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["local", "cumulative", "output", "engine"]


@dataclass(frozen=True)
class Case:
    """One input: a batch of images of rows × cols tokens, text tokens, at one timestep (0 to 1000)."""

    batch: int
    rows: int
    cols: int
    txt_tokens: int
    timestep: float

    @property
    def img_tokens(self) -> int:
        return self.rows * self.cols

    def __str__(self) -> str:
        image = f"{self.rows}×{self.cols} image tokens"
        return f"batch {self.batch}, {image}, {self.txt_tokens} text tokens, t={self.timestep:g}"


@dataclass(frozen=True)
class Errors:
    """How far a tensor is from its reference.

    Args:
        cosine: cosine similarity over all elements.
        rel_l2: ‖tensor − reference‖ / ‖reference‖.
        max_abs: largest absolute difference.
        nonfinite: NaN and Inf in the tensor; with any, the other figures are NaN.
    """

    cosine: float
    rel_l2: float
    max_abs: float
    nonfinite: int = 0

    @property
    def badness(self) -> tuple[bool, float]:
        """Orders errors: NaN is worse than any figure."""
        undefined = self.nonfinite > 0 or math.isnan(self.rel_l2)
        return undefined, 0.0 if undefined else self.rel_l2


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: the call or output compared, e.g. ``blocks.3`` or ``sample``.
        level: ``local`` (equal inputs), ``cumulative`` (each side's own chain), ``output`` (the chain's final
            output), ``engine`` (the whole engine in one run).
        case: the input.
        errors: the figures.
        binding: whether the tolerance binds it (cumulative errors are only reported).
        passed: whether it is within tolerance; a check that does not bind passes if it is finite.
    """

    name: str
    level: Level
    case: Case
    errors: Errors
    binding: bool
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """The outcome of verifying one engine against the eager fp32 model.

    Args:
        bundle: the bundle's name.
        target: e.g. ``ort-cpu``.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        weights: where the weights came from, e.g. ``random (seed 0)`` or a checkpoint's path.
        reference: what it was compared with, in words.
        executed: what was run, in words, one item each; what was emulated says so.
        not_executed: what was not run, and why.
        tolerance: the bounds, as in `Tolerance`, with the reason.
        checks: every comparison, in the order of the model.
        seconds: wall time.
        engine_executed: whether the engine itself computed anything. A TensorRT engine that was built on a machine
            that cannot run it has only its graph compared.
        machine: what the engine ran on, as `machine_facts` has it; empty where it did not run.
    """

    bundle: str
    target: str
    precision: str
    weights: str
    reference: str
    executed: tuple[str, ...]
    not_executed: tuple[str, ...]
    tolerance: dict[str, Any]
    checks: tuple[Check, ...]
    seconds: float
    engine_executed: bool = True
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing is out of tolerance."""
        return any(c.binding for c in self.checks) and all(c.passed for c in self.checks)

    @property
    def first_failure(self) -> Check | None:
        """The first check out of tolerance, in the order of the model."""
        return next((c for c in self.checks if not c.passed), None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with `passed` included; NaN and infinity become None."""
        data = dataclasses.asdict(self)
        for check in data["checks"]:
            check["errors"] = {k: v if math.isfinite(v) else None for k, v in check["errors"].items()}
        return {"passed": self.passed, **data}
