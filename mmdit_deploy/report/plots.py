"""The two plots of a verdict: errors by block, and errors of the outputs by case."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmdit_deploy.report.summary import badness
from mmdit_deploy.report.svg import Plot, Point, Series, draw
from mmdit_deploy.report.words import case_words, errors_words, printable
from mmdit_deploy.verify.records import Case, Check, Level, Verdict


def block_plot(verdict: Verdict) -> str:
    """rel-L2 by block, local and cumulative: a dot for each case, a line for the worst. Empty if there is none."""
    checks = [c for c in verdict.checks if c.level in ("local", "cumulative")]
    names = list(dict.fromkeys(c.name for c in checks))
    places = {name: i for i, name in enumerate(names)}
    x_title, labels = _block_labels(names)
    return _plot(
        verdict,
        checks,
        ("local", "cumulative"),
        [places[c.name] for c in checks],
        title=f"rel-L2 by block, {verdict.target}",
        x_title=x_title,
        labels=labels,
    )


def output_plot(verdict: Verdict) -> str:
    """rel-L2 of the outputs by case, ordered by timestep: a dot for each output. Empty if there is none."""
    checks = [c for c in verdict.checks if c.level in ("output", "engine")]
    cases = sorted(
        dict.fromkeys(c.case for c in checks),
        key=lambda c: (c.batch, c.img_tokens, c.rows, c.txt_tokens, c.timestep),
    )
    places = {case: i for i, case in enumerate(cases)}
    return _plot(
        verdict,
        checks,
        ("output", "engine"),
        [places[c.case] for c in checks],
        title=f"rel-L2 of outputs by case, {verdict.target}",
        x_title="case: timestep; batch × image tokens; text tokens",
        labels=tuple(_case_label(case) for case in cases),
    )


def _plot(
    verdict: Verdict,
    checks: Sequence[Check],
    levels: Sequence[Level],
    places: Sequence[int],
    *,
    title: str,
    x_title: str,
    labels: tuple[str, ...],
) -> str:
    if not checks:
        return ""
    series = []
    for level, marker in zip(levels, ("circle", "diamond"), strict=True):
        points = tuple(
            _point(check, place) for check, place in zip(checks, places, strict=True) if check.level == level
        )
        if points:
            bound = any(c.binding for c in checks if c.level == level)
            label = level if bound else f"{level} (only reported)"
            series.append(Series(label, "circle" if marker == "circle" else "diamond", points))
    bound = verdict.tolerance.get("max_rel_l2")
    first = next(((c, place) for c, place in zip(checks, places, strict=True) if not c.passed), None)
    return draw(
        Plot(
            title=printable(title),
            x_title=x_title,
            labels=labels,
            series=tuple(series),
            bound=None if bound is None else (float(bound), f"tolerance {bound:.12g}"),
            mark=None if first is None else (first[1], f"first out: {printable(first[0].name)}"),
        )
    )


def _point(check: Check, place: int) -> Point:
    words = f"{printable(check.name)} {check.level}, {case_words(check.case)}: {errors_words(check.errors)}"
    # The key's first members say non-finite and NaN-is-infinite; a strip of the plot is for both.
    nonfinite, value, _ = badness(check)
    return Point(place, float("inf") if nonfinite else value, words, not check.passed)


def _block_labels(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Bare numbers where all names are of one list, so that more of them fit."""
    matches = [re.fullmatch(r"(.*\.)(\d+)", name) for name in names]
    prefixes = {match[1] if match else None for match in matches}
    if len(prefixes) == 1 and None not in prefixes:
        return f"{printable(prefixes.pop() or '')}N", tuple(match[2] for match in matches if match)
    return "call", tuple(printable(name) for name in names)


def _case_label(case: Case) -> str:
    return f"t={case.timestep:g}\n{case.batch} × {case.rows}×{case.cols}\n{case.txt_tokens} txt"
