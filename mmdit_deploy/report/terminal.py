"""A verdict as plain text: what an engineer reads first, and what survives a pipe or a log."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mmdit_deploy.report.summary import bounds_used, counted, failing, floor_words, level_summaries, outcome
from mmdit_deploy.report.words import (
    bounds,
    breaches,
    case_words,
    cosine_figure,
    duration,
    figure,
    image_words,
    printable,
    times,
)
from mmdit_deploy.verify.records import Check, Verdict

WIDTH = 110
MAX_FAILURES = 4
MAX_ITEMS = 6


def verdict_text(verdict: Verdict) -> str:
    """A verdict in at most some thirty lines, however many blocks there are.

    Args:
        verdict: the outcome of one engine.

    Returns:
        Lines without colours or control characters; ends without a newline.
    """
    lines = [
        _headline(verdict),
        *_entry("weights", verdict.weights),
        *_entry("reference", verdict.reference),
        *(line for words in _tolerances(verdict) for line in _entry("tolerance", words)),
        *(line for words in floor_words(verdict) for line in _entry("floor", words)),
    ]
    if verdict.checks:
        lines += ["", *_table(verdict), *_images(verdict)]
    if verdict.first_failure is not None:
        lines += ["", *_failures(verdict)]
    lines += ["", *_list("executed", verdict.executed, "nothing")]
    lines += _list("NOT executed", verdict.not_executed, "nothing was left out")
    return "\n".join(lines)


def _headline(verdict: Verdict) -> str:
    line = (
        f"{outcome(verdict)}  {printable(verdict.bundle)} on {printable(verdict.target)}, "
        f"{printable(verdict.precision)}, {duration(verdict.seconds)}"
    )
    if outcome(verdict) == "NOT VERIFIED":
        line += "; no check that the tolerance binds was run"
    if outcome(verdict) == "NOT EXECUTED":
        line += "; the engine was built, its graph is within tolerance"
    if verdict.not_executed:
        line += f"; {counted(len(verdict.not_executed), 'item')} not executed"
    return line


def _tolerances(verdict: Verdict) -> list[str]:
    lines = []
    for of, tolerance in bounds_used(verdict):
        reason = tolerance.get("reason")
        lines.append((f"{of}: " if of else "") + bounds(tolerance) + (f" ({reason})" if reason else ""))
    return lines


def _images(verdict: Verdict) -> list[str]:
    return [f"  {check.name}: {image_words(check.errors)}" for check in verdict.checks if check.level == "image"]


def _table(verdict: Verdict) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("level", "checks", "out", "rel-L2", "cosine", "max-abs", "× floor", "where rel-L2 is worst")
    ]
    summaries = level_summaries(verdict)
    for s in summaries:
        rows.append(
            (
                s.level if s.binding else f"{s.level} *",
                str(s.checks),
                str(s.out),
                figure(s.rel_l2),
                cosine_figure(s.cosine),
                figure(s.max_abs),
                times(s.times_floor),
                _where(s.where),
            )
        )
    if all(s.times_floor is None for s in summaries):
        rows = [(*row[:6], row[7]) for row in rows]
    last = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(last)]
    lines = [
        "  ".join(["", row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, last)), row[last]])
        for row in rows
    ]
    if not all(s.binding for s in summaries):
        lines.append("  * reported; the tolerance does not bind it, but it must be finite")
    return lines


def _where(check: Check) -> str:
    return f"{printable(check.name)} ({case_words(check.case)})"


def _failures(verdict: Verdict) -> list[str]:
    groups = failing(verdict)
    lines = ["first out of tolerance:"]
    for i, (check, cases) in enumerate(groups[:MAX_FAILURES]):
        if i == 1:
            lines.append("then, each in its worst case:")
        several = f", out in {cases} cases" if cases > 1 else ""
        lines.append(f"  {check.level} {_where(check)}{several}")
        lines.append(f"    {breaches(check, verdict.tolerance_of(check))}")
        # The first one is what gets debugged: it deserves all its figures.
        if i == 0 and not check.errors.nonfinite:
            lines[-1] += f"; max-abs {figure(check.errors.max_abs)}"
    if len(groups) > MAX_FAILURES:
        lines.append(f"  and {len(groups) - MAX_FAILURES} more")
    return lines


def _list(title: str, entries: Sequence[str], empty: str) -> list[str]:
    if not entries:
        return [f"{title}: {empty}"]
    lines = [f"{title}:"]
    for entry in entries[:MAX_ITEMS]:
        lines += _wrap("  - ", printable(entry))
    if len(entries) > MAX_ITEMS:
        lines.append(f"  and {len(entries) - MAX_ITEMS} more")
    return lines


def _entry(name: str, text: str) -> list[str]:
    return _wrap(f"  {name:<11}", printable(text))


def _wrap(prefix: str, text: str) -> list[str]:
    return textwrap.wrap(
        text or "-",
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=" " * len(prefix),
        break_long_words=False,  # a path that is cut in two cannot be copied
        break_on_hyphens=False,
    )
