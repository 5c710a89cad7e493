"""What verification found, as plain data: reports, manifests and exit statuses derive from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["local", "nodes", "cumulative", "output", "engine", "trajectory", "image"]


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
        psnr, ssim, lpips: of images: peak signal-to-noise ratio in dB, structural similarity, perceptual distance. None
            where it was not measured.
    """

    cosine: float
    rel_l2: float
    max_abs: float
    nonfinite: int = 0
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None

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
        level: ``local`` (equal inputs), ``nodes`` (the worst operator of a call, each on the
            engine's own values), ``cumulative`` (each side's own chain), ``output`` (the chain's final
            output), ``engine`` (the whole engine in one run), ``trajectory`` (the latent after a sampling step),
            ``image`` (what the last latent becomes).
        case: the input.
        errors: the figures.
        binding: whether the tolerance binds it (cumulative errors are only reported).
        passed: whether it is within tolerance; a check that does not bind passes if it is finite.
        bound_by: the name of its tolerance in the verdict's `tolerances`; None for the verdict's own.
        floor: rel-L2 of the noise floor at the same place; None where it was not measured.
        value: of ``nodes``, which value of the call it is, by its name in the graph's function.
        bounds: of its tolerance, those that are wider here, for what is quantized there may be rounded either way.
    """

    name: str
    level: Level
    case: Case
    errors: Errors
    binding: bool
    passed: bool
    bound_by: str | None = None
    floor: float | None = None
    value: str | None = None
    bounds: Mapping[str, float] | None = None

    @property
    def times_floor(self) -> float | None:
        """The error as a multiple of the noise floor; None where that is not known, or zero."""
        return self.errors.rel_l2 / self.floor if self.floor else None


@dataclass(frozen=True)
class NoiseFloor:
    """How far the eager model is from itself, computed in another way: errors below it mean nothing.

    Args:
        what: the other way, in words: ``eager in float16``, ``torch.compile in float32``.
        cases: on how many of the verdict's cases it was measured.
        calls: the largest rel-L2 of each call alone, on equal inputs, by path.
        output: the largest rel-L2 of the final output.
        seconds: what measuring it took.
    """

    what: str
    cases: int
    calls: Mapping[str, float]
    output: float
    seconds: float


@dataclass(frozen=True)
class TrajectoryStep:
    """The latent after one sampling step.

    Args:
        timestep: at which the model was asked, 0 to 1000.
        errors: of the engine's latent against the eager model's.
        floor: rel-L2 of the eager model's own latent, computed in the engine's compute type; None if not measured.
    """

    timestep: float
    errors: Errors
    floor: float | None = None


@dataclass(frozen=True)
class Trajectory:
    """The engine's own trajectory beside the eager model's, from the same noise.

    Args:
        name: of the latent, e.g. ``latent``.
        case: the shape; its timestep is that of the first step.
        sampler: in words.
        engine: how the engine ran, in words.
        steps: in order.
    """

    name: str
    case: Case
    sampler: str
    engine: str
    steps: tuple[TrajectoryStep, ...]


@dataclass(frozen=True)
class Verdict:
    """The outcome of verifying one engine against the eager fp32 model.

    Args:
        bundle: the bundle's name.
        target: e.g. ``ort-cpu``.
        precision: e.g. ``fp16`` or ``fp8``.
        weights: where the weights came from, e.g. ``random (seed 0)`` or a checkpoint's path.
        reference: what it was compared with, in words.
        executed: what was run, in words, one item each; what was emulated says so.
        not_executed: what was not run, and why.
        tolerance: the bounds of a step, as in `Tolerance`, with the reason.
        checks: every comparison, in the order of the model.
        seconds: wall time.
        engine_executed: whether the engine itself computed anything. A TensorRT engine that was built on a machine
            that cannot run it has only its graph compared.
        machine: what the engine ran on, as `machine_facts` has it; empty where it did not run.
        tolerances: other bounds, by the name that checks have in `bound_by`.
        tolerance_source: the file that all bounds are from, in words.
        noise_floors: what was measured; checks have the first one's figures.
        trajectories: those that were sampled.
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
    tolerances: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tolerance_source: str = ""
    noise_floors: tuple[NoiseFloor, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()

    def tolerance_of(self, check: Check) -> Mapping[str, Any]:
        """The bounds of one of its checks."""
        named = self.tolerance if check.bound_by is None else self.tolerances[check.bound_by]
        return {**named, **(check.bounds or {})}

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing is out of tolerance."""
        return any(c.binding for c in self.checks) and all(c.passed for c in self.checks)

    @property
    def first_failure(self) -> Check | None:
        """The first check out of tolerance, in the order of the model."""
        return next((c for c in self.checks if not c.passed), None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with `passed` included; NaN and infinity become None, and what was not measured is left out."""
        return {"passed": self.passed, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}


def _plain(value: Any) -> Any:
    """Records as dictionaries, of what JSON can hold."""
    if dataclasses.is_dataclass(value):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(v) for name, v in named.items() if v is not None}
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
