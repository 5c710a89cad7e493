"""What all reports say about verdicts: the outcome, and the worst by level and by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmdit_deploy.report.words import figure, times
from mmdit_deploy.verify.records import Check, Level, Verdict

Outcome = Literal["PASS", "FAIL", "NOT EXECUTED", "NOT VERIFIED"]

LEVELS: dict[Level, str] = {
    "local": "each block alone, on equal inputs",
    "nodes": "each operator alone, on the engine's own values",
    "cumulative": "each side's own chain, up to this block",
    "output": "the chain's final output",
    "engine": "the whole engine in one run",
    "trajectory": "the latent after each sampling step, each side's own",
    "image": "what the last latent becomes",
}
# What decides how good an engine is: the noise floor is told for the first of these that was checked.
RESULTS: tuple[Level, ...] = ("engine", "output")


def outcome(verdict: Verdict) -> Outcome:
    """PASS or FAIL if something was checked; what was not checked neither passed nor failed.

    An engine that was built and not executed has not passed: only its graph has.
    """
    if verdict.passed:
        return "PASS" if verdict.engine_executed else "NOT EXECUTED"
    return "NOT VERIFIED" if verdict.first_failure is None else "FAIL"


# Of several engines: the first of these that one has is what may be said of all.
BY_RANK: tuple[Outcome, ...] = ("FAIL", "NOT VERIFIED", "NOT EXECUTED", "PASS")


def heading(verdicts: Sequence[Verdict]) -> str:
    """The outcome that all engines have, or each one's: ``PASS on ort-cpu · rtx:sm89 built, not executed``."""
    outcomes = [outcome(v) for v in verdicts]
    if len(set(outcomes)) < 2:
        return overall(verdicts)[0]
    words: dict[Outcome, str] = {
        "FAIL": "FAIL on {}",
        "PASS": "PASS on {}",
        "NOT EXECUTED": "{} built, not executed",
        "NOT VERIFIED": "{} not verified",
    }
    named = {said: ", ".join(v.target for v in verdicts if outcome(v) == said) for said in words}
    return " · ".join(words[said].format(targets) for said, targets in named.items() if targets)


def overall(verdicts: Sequence[Verdict]) -> tuple[Outcome, str]:
    """The least that is so of several engines together, and a sentence that counts them."""
    outcomes = [outcome(v) for v in verdicts]
    if not outcomes:
        return "NOT VERIFIED", "No engine was verified."
    words: dict[Outcome, str] = {
        "PASS": "within tolerance",
        "FAIL": "out of tolerance",
        "NOT EXECUTED": "built, not executed (its graph is within tolerance)",
        "NOT VERIFIED": "not verified",
    }
    if len(outcomes) == 1:
        sentence = f"The engine is {words[outcomes[0]]}."
    else:
        counts = [f"{outcomes.count(o)} {said}" for o, said in words.items() if o in outcomes]
        sentence = f"{len(outcomes)} engines: {', '.join(counts)}."
    unexecuted = sum(len(v.not_executed) for v in verdicts)
    if unexecuted:
        sentence += f" {counted(unexecuted, 'item')} not executed."
    return next(o for o in BY_RANK if o in outcomes), sentence


def counted(count: int, noun: str) -> str:
    """``1 item``, ``2 items``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _badness(check: Check) -> tuple[bool, float, bool]:
    """A sort key by rel-L2: non-finite is worse than any figure; of equals, what is out is worse."""
    return (check.errors.nonfinite > 0, _nan_is_worst(check.errors.rel_l2), not check.passed)


def worst(checks: Iterable[Check]) -> Check:
    """The check with the largest rel-L2; non-finite is worse than any figure."""
    return max(checks, key=_badness)


def by_name(checks: Iterable[Check]) -> dict[tuple[Level, str], list[Check]]:
    """The cases of each comparison, keyed by level and name, in the order of the model."""
    groups: dict[tuple[Level, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.level, check.name), []).append(check)
    return groups


@dataclass(frozen=True)
class LevelSummary:
    """The checks of one level, each figure the worst of its own kind.

    Args:
        level: the level.
        checks: how many comparisons.
        out: how many are out of tolerance, or not finite.
        binding: whether the tolerance binds any of them.
        rel_l2: the largest; infinite or NaN if any is.
        cosine: the least; NaN if any is.
        max_abs: the largest; NaN if any is.
        where: the check with the largest rel-L2.
        times_floor: the largest multiple of the noise floor; None where none is known.
    """

    level: Level
    checks: int
    out: int
    binding: bool
    rel_l2: float
    cosine: float
    max_abs: float
    where: Check
    times_floor: float | None = None


def level_summaries(verdict: Verdict) -> list[LevelSummary]:
    """A summary of every level that was checked."""
    summaries = []
    for level in LEVELS:
        checks = [c for c in verdict.checks if c.level == level]
        if checks:
            summaries.append(
                LevelSummary(
                    level,
                    checks=len(checks),
                    out=sum(not c.passed for c in checks),
                    binding=any(c.binding for c in checks),
                    rel_l2=worst(checks).errors.rel_l2,
                    cosine=min((c.errors.cosine for c in checks), key=_nan_is_least),
                    max_abs=max((c.errors.max_abs for c in checks), key=_nan_is_worst),
                    where=worst(checks),
                    times_floor=most_times_floor(checks),
                )
            )
    return summaries


def most_times_floor(checks: Iterable[Check]) -> float | None:
    """The largest multiple of the noise floor; None where none is known."""
    return max((c.times_floor for c in checks if c.times_floor is not None), key=_nan_is_worst, default=None)


def floor_words(verdict: Verdict) -> list[str]:
    """Every noise floor in a sentence, the first with the engine's error as a multiple of it."""
    sentences = []
    for i, floor in enumerate(verdict.noise_floors):
        sentence = f"{floor.what}: rel-L2 {figure(floor.output)} at the output, worst of {counted(floor.cases, 'case')}"
        if math.isnan(floor.output):
            sentence = f"{floor.what}: NaN or Inf at the output"
        level = next((name for name in RESULTS if any(c.level == name for c in verdict.checks)), None)
        multiple = most_times_floor(c for c in verdict.checks if c.level == level)
        if i == 0 and multiple is not None:
            sentence += f"; the engine's error is at most {times(multiple)} that"
        sentences.append(sentence)
    return sentences


def bounds_used(verdict: Verdict) -> list[tuple[str, Mapping[str, Any]]]:
    """The tolerances that bind a check of a verdict, its own first: what each is for, and its bounds."""
    used = dict.fromkeys(c.bound_by for c in verdict.checks if c.binding and c.bound_by is not None)
    words = {"trajectory": "the last latent", "image": "the image"}
    named = [(words.get(name, f"calls in {name}"), verdict.tolerances[name]) for name in used]
    wider = [verdict.tolerance_of(c) for c in verdict.checks if c.binding and c.bounds]
    if wider:
        widest = max(wider, key=lambda tolerance: float(tolerance["max_rel_l2"]))
        named.append(("operators that quantize, at most", widest))
    return [("", verdict.tolerance), *named]


def failing(verdict: Verdict) -> list[tuple[Check, int]]:
    """What is out of tolerance, and in how many cases: the first failure, then the others' worst cases."""
    groups = list(by_name(c for c in verdict.checks if not c.passed).values())
    # The first is shown as it was found; of the others, the worst case says more than the first one.
    return [(group[0] if i == 0 else worst(group), len(group)) for i, group in enumerate(groups)]


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _nan_is_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
