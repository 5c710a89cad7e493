"""The plots of a verdict: errors by block, of the outputs by case, and of the latent by sampling step."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mmdit_deploy.report.svg import Marker, Plot, Point, Series, draw
from mmdit_deploy.report.words import case_words, errors_words, figure, printable
from mmdit_deploy.verify.records import Case, Check, Level, Trajectory, Verdict

MARKERS: tuple[Marker, Marker] = ("circle", "diamond")
FLOOR = "noise floor"


def block_plot(verdict: Verdict) -> str:
    """rel-L2 by block, local and cumulative: a dot a case, a line for the worst. Empty if there is none.

    What an operator inside of a block is off by is no point of the plot; the block is marked where it is the first.
    """
    checks = [c for c in verdict.checks if c.level in ("local", "cumulative")]
    names = list(dict.fromkeys(c.name for c in checks))
    places = {name: i for i, name in enumerate(names)}
    x_title, labels = _block_labels(names)
    levels = ("local", "nodes", "cumulative")
    out = {c.name for c in verdict.checks if c.level in levels and c.name in places and not c.passed}
    first = min(out, key=places.__getitem__, default=None)
    return _plot(
        verdict,
        checks,
        ("local", "cumulative"),
        [places[c.name] for c in checks],
        title=f"rel-L2 by block, {verdict.target}",
        x_title=x_title,
        labels=labels,
        mark=None if first is None else (places[first], f"first out: {printable(first)}"),
    )


def output_plot(verdict: Verdict) -> str:
    """rel-L2 of the outputs by case: a line joins the timesteps of one shape. Empty if there is none."""
    checks = [c for c in verdict.checks if c.level in ("output", "engine")]
    cases = sorted(dict.fromkeys(c.case for c in checks), key=lambda case: (_shape(case), case.timestep))
    places = {case: i for i, case in enumerate(cases)}
    return _plot(
        verdict,
        checks,
        ("output", "engine"),
        [places[c.case] for c in checks],
        title=f"rel-L2 of outputs by case, {verdict.target}",
        x_title="case: timestep; batch \N{MULTIPLICATION SIGN} image tokens; text tokens",
        labels=tuple(_case_label(case) for case in cases),
        breaks=frozenset(i for i in range(1, len(cases)) if _shape(cases[i]) != _shape(cases[i - 1])),
    )


def trajectory_plot(verdict: Verdict, trajectory: Trajectory) -> str:
    """rel-L2 of the latent by sampling step, with the noise floor's where it was sampled."""
    bound = verdict.tolerances.get("trajectory", {}).get("max_rel_l2")
    last = len(trajectory.steps) - 1
    points, floors = [], []
    for i, step in enumerate(trajectory.steps):
        errors = step.errors
        words = f"step {i + 1}, t={step.timestep:g}: {errors_words(errors)}"
        out = errors.nonfinite > 0 or (i == last and bound is not None and not errors.rel_l2 <= bound)
        points.append(Point(i, math.nan if errors.nonfinite else errors.rel_l2, words, out))
        if step.floor is not None:
            floors.append(_floor_point(f"step {i + 1}", i, step.floor))
    series = [Series("engine against eager", "circle", tuple(points))]
    if floors:
        series.append(Series(FLOOR, "bar", tuple(floors)))
    return draw(
        Plot(
            title=printable(f"rel-L2 of the latent by sampling step, {verdict.target}"),
            x_title=printable(f"step ({trajectory.sampler})"),
            labels=tuple(str(i + 1) for i in range(len(trajectory.steps))),
            series=tuple(series),
            bound=None if bound is None else (float(bound), f"tolerance of the last {bound:.12g}"),
        )
    )


def _floor_point(place_words: str, place: int, floor: float) -> Point:
    return Point(place, floor, f"{FLOOR} of {place_words}: rel-L2 {figure(floor)}", False)


def _plot(
    verdict: Verdict,
    checks: Sequence[Check],
    levels: Sequence[Level],
    places: Sequence[int],
    *,
    title: str,
    x_title: str,
    labels: tuple[str, ...],
    breaks: frozenset[int] = frozenset(),
    mark: tuple[int, str] | None = None,
) -> str:
    if not checks:
        return ""
    series = []
    for level, marker in zip(levels, MARKERS, strict=True):
        points = tuple(
            _point(check, place) for check, place in zip(checks, places, strict=True) if check.level == level
        )
        if points:
            binding = any(c.binding for c in checks if c.level == level)
            series.append(Series(level if binding else f"{level} (only reported)", marker, points))
    # Of the first level, which the tolerance binds: what is below its floor is noise.
    floors = tuple(
        _floor_point(f"{printable(check.name)}, {case_words(check.case)}", place, check.floor)
        for check, place in zip(checks, places, strict=True)
        if check.level == levels[0] and check.floor is not None
    )
    if floors:
        series.append(Series(FLOOR, "bar", floors))
    bound = verdict.tolerance.get("max_rel_l2")
    return draw(
        Plot(
            title=printable(title),
            x_title=x_title,
            labels=labels,
            series=tuple(series),
            bound=None if bound is None else (float(bound), f"tolerance {bound:.12g}"),
            breaks=breaks,
            mark=mark,
        )
    )


def _point(check: Check, place: int) -> Point:
    words = f"{printable(check.name)} {check.level}, {case_words(check.case)}: {errors_words(check.errors)}"
    value = math.nan if check.errors.nonfinite else check.errors.rel_l2
    return Point(place, value, words, not check.passed)


def _block_labels(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Bare numbers where all names are of one list, so that more of them fit."""
    matches = [re.fullmatch(r"(.*\.)(\d+)", name) for name in names]
    prefixes = {match[1] if match else None for match in matches}
    if len(prefixes) == 1 and None not in prefixes:
        return f"{printable(prefixes.pop() or '')}N", tuple(match[2] for match in matches if match)
    return "call", tuple(printable(name) for name in names)


def _shape(case: Case) -> tuple[int, ...]:
    return (case.batch, case.img_tokens, case.rows, case.txt_tokens)


def _case_label(case: Case) -> str:
    shape = f"{case.batch} \N{MULTIPLICATION SIGN} {case.rows}\N{MULTIPLICATION SIGN}{case.cols}"
    return f"t={case.timestep:g}\n{shape}\n{case.txt_tokens} txt"
