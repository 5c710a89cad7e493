"""Verdicts as one HTML file on its own: it opens from disk, prints, and has dark and light colours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mmdit_deploy.atomic import write_whole
from mmdit_deploy.report.plots import block_plot, output_plot, trajectory_plot
from mmdit_deploy.report.summary import (
    LEVELS,
    bounds_used,
    by_name,
    counted,
    failing,
    floor_words,
    heading,
    level_summaries,
    outcome,
    overall,
    worst,
)
from mmdit_deploy.report.words import (
    bounds,
    breaches,
    case_words,
    cosine_figure,
    duration,
    errors_words,
    figure,
    image_words,
    machine_words,
    printable,
    times,
)
from mmdit_deploy.verify.records import Check, Level, Verdict

MAX_FAILURES = 10
BLOCK_LEVELS: tuple[Level, ...] = ("local", "nodes", "cumulative")


def verdict_html(verdicts: Sequence[Verdict], *, title: str, facts: Mapping[str, str]) -> str:
    """The page for any number of engines.

    Args:
        verdicts: one per engine.
        title: the page's heading.
        facts: what to know about the export (spec, versions, seeds), shown as a table in this order.

    Returns:
        HTML without scripts or external references; all text from outside is escaped.
    """
    # jinja2 takes a third of the time that `--help` may take; only who writes a page needs it.
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("mmdit_deploy.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    worst_outcome, sentence = overall(verdicts)
    return environment.from_string(source).render(
        title=printable(title),
        outcome=worst_outcome,
        heading=printable(heading(verdicts)),
        sentence=sentence,
        facts=[(printable(name), printable(value)) for name, value in facts.items()],
        engines=[_engine(v) for v in verdicts],
    )


def write_html(
    verdicts: Sequence[Verdict], path: str | os.PathLike[str], *, title: str, facts: Mapping[str, str]
) -> None:
    """Write `verdict_html` to a file, which appears whole or not at all; missing folders are made.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, verdict_html(verdicts, title=title, facts=facts))


def _engine(verdict: Verdict) -> dict[str, Any]:
    """What the template shows of one engine. Only the plots are markup, and they escape what they hold."""
    failures = failing(verdict)
    return {
        "outcome": outcome(verdict),
        "bundle": printable(verdict.bundle),
        "target": printable(verdict.target),
        "precision": printable(verdict.precision),
        "duration": duration(verdict.seconds),
        "weights": printable(verdict.weights),
        "reference": printable(verdict.reference),
        "machine": printable(machine_words(verdict.machine)),
        "bounds": [
            (printable(of), bounds(tolerance), printable(str(tolerance.get("reason", ""))))
            for of, tolerance in bounds_used(verdict)
        ],
        "tolerance_source": printable(verdict.tolerance_source),
        "noise_floors": [printable(words) for words in floor_words(verdict)],
        "images": [(printable(c.name), image_words(c.errors)) for c in verdict.checks if c.level == "image"],
        "levels": [
            {
                "name": s.level,
                "meaning": LEVELS[s.level],
                "binding": s.binding,
                "checks": s.checks,
                "out": s.out,
                "rel_l2": figure(s.rel_l2),
                "cosine": cosine_figure(s.cosine),
                "max_abs": figure(s.max_abs),
                "times_floor": times(s.times_floor),
                "name_where": printable(s.where.name),
                "case_where": case_words(s.where.case),
            }
            for s in level_summaries(verdict)
        ],
        "failures": [_failure(check, cases, verdict) for check, cases in failures[:MAX_FAILURES]],
        "more_failures": len(failures) - MAX_FAILURES,
        "plots": [
            (caption, svg)
            for caption, svg in (
                (
                    "Error by block: a dot for each case, a line through the worst. Red is out of tolerance.",
                    block_plot(verdict),
                ),
                ("Error of the outputs by case. Red is out of tolerance.", output_plot(verdict)),
                *(
                    (
                        f"Error of the latent over sampling: {case_words(t.case)}; {printable(t.engine)}.",
                        trajectory_plot(verdict, t),
                    )
                    for t in verdict.trajectories
                ),
            )
            if svg
        ],
        **_blocks(verdict),
        "outputs": [_row(c) for c in verdict.checks if c.level not in BLOCK_LEVELS],
        "executed": [printable(words) for words in verdict.executed],
        "not_executed": [printable(words) for words in verdict.not_executed],
    }


def _failure(check: Check, cases: int, verdict: Verdict) -> dict[str, str]:
    return {
        "level": check.level,
        "name": printable(check.name),
        "case": case_words(check.case),
        "cases": counted(cases, "case"),
        "why": breaches(check, verdict.tolerance_of(check)),
        "figures": errors_words(check.errors),
    }


def _blocks(verdict: Verdict) -> dict[str, Any]:
    """The table of all blocks: the worst case of each, side by side for the levels that were checked."""
    groups = by_name(c for c in verdict.checks if c.level in BLOCK_LEVELS)
    levels = [level for level in BLOCK_LEVELS if any(level == checked for checked, _ in groups)]
    rows = []
    for name in dict.fromkeys(name for _, name in groups):
        cells = [_row(worst(groups[level, name])) if (level, name) in groups else None for level in levels]
        rows.append((printable(name), cells))
    return {"block_levels": levels, "blocks": rows}


def _row(check: Check) -> dict[str, Any]:
    errors = check.errors
    return {
        "name": printable(check.name),
        "level": check.level,
        "case": case_words(check.case),
        "rel_l2": f"{errors.nonfinite} NaN or Inf" if errors.nonfinite else figure(errors.rel_l2),
        "cosine": cosine_figure(errors.cosine),
        "max_abs": figure(errors.max_abs),
        "times_floor": times(check.times_floor),
        "out": not check.passed,
    }
