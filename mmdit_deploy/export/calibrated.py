"""The eager model, run to calibrate: on captured inputs, or on denoising trajectories of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmdit_deploy.calibration.captured import calibrate_captured, read_captured
from mmdit_deploy.calibration.observe import Progress
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.calibration.trajectory import KEPT_STEPS, PROMPTS, SEED, SIZES, STEPS, calibrate_trajectory
from mmdit_deploy.eager.calls import Values
from mmdit_deploy.eager.program import Program
from mmdit_deploy.export.request import ExportRequest

Log = Callable[[str], None]
KEPT_SAMPLES = 6  # of captured ones, evenly spaced: a pipeline's calls come step after step


@dataclass(frozen=True)
class Calibrated:
    """What calibration saw.

    Args:
        samples: inputs of the model, some of those that it ran on.
        record: what it ran on, JSON-ready.
    """

    statistics: Statistics
    samples: tuple[Values, ...]
    record: Mapping[str, Any]


def calibrate(request: ExportRequest, programs: Mapping[str, Program], log: Log) -> Calibrated:
    """Run the eager model in fp32 and take in what it computes.

    Args:
        programs: of the model's kinds.

    Raises:
        CheckpointError: it computes NaN or Inf, or the captured inputs cannot be read.
        UsageError: they are of another model.
    """
    dtype = getattr(torch, request.precision.dtype)
    if request.calib is not None:
        captured = read_captured(request.calib, request.spec)
        log(f"calibration: {len(captured.names)} samples of {request.calib.name}")
        statistics = calibrate_captured(
            request.spec, request.weights, captured, dtype, programs=programs, progress=by_tenths("calibration", log)
        )
        kept = tuple(captured.sample(name) for name in spaced(captured.names, KEPT_SAMPLES))
        return Calibrated(statistics, kept, {"samples": len(captured.names), "captured": request.calib.name})
    log(f"calibration: {STEPS} steps of {len(SIZES) * PROMPTS} trajectories of the eager model")
    seen: list[Values] = []

    def visit(step: int, states: Sequence[Values]) -> None:
        if step in KEPT_STEPS:
            seen.extend(dict(state) for state in states)

    statistics = calibrate_trajectory(
        request.spec, request.weights, dtype, programs=programs, visit=visit, progress=_by_steps(log)
    )
    record = {"samples": len(SIZES) * PROMPTS, "steps": STEPS, "seed": SEED, "sizes": [list(size) for size in SIZES]}
    return Calibrated(statistics, tuple(seen), record)


def spaced(names: Sequence[str], count: int) -> tuple[str, ...]:
    """So many names at equal distances, the first and the last among them; all where there are no more."""
    if len(names) <= count:
        return tuple(names)
    return tuple(names[i * (len(names) - 1) // (count - 1)] for i in range(count))


def by_tenths(what: str, log: Log) -> Progress:
    """A line for each tenth of a pass over the model's calls; how many passes there are is found on the way."""
    passes, said = 0, -1

    def report(_: str, index: int, count: int) -> None:
        nonlocal passes, said
        if index == 0:
            passes, said = passes + 1, -1
        if (tenth := 10 * index // count) > said:
            said = tenth
            log(f"{what}: pass {passes} over the model, {100 * index // count} %")

    return report


def _by_steps(log: Log) -> Progress:
    """A line for each step, not for each call."""
    said: set[str] = set()

    def report(what: str, index: int, count: int) -> None:
        step, colon, _ = what.partition(":")
        if colon and step not in said:
            said.add(step)
            log(f"calibration: {step}")

    return report
