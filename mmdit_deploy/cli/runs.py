"""Calls of a model that are alike, as one line of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Run:
    """Neighbours of one kind that are alike.

    Args:
        name: the first and the last, ``blocks.0 … blocks.22``.
        calls: how many.
        counts: of each.
    """

    name: str
    calls: int
    counts: tuple[int, ...]


def runs(calls: Sequence[str], *by_call: Mapping[str, int]) -> list[Run]:
    """Counts by call, in the model's order, with neighbours that are alike (``blocks.0`` to ``blocks.22``) as one.

    Args:
        calls: of the model, in order.
        by_call: what is counted. What is none of the calls comes last; what has no count has none.
    """
    kinds: dict[str, list[str]] = {}
    for call in dict.fromkeys([*calls, *(call for counts in by_call for call in counts)]):
        kind = ".".join("*" if step.isdecimal() else step for step in call.split("."))
        kinds.setdefault(kind, []).append(call)
    found = []
    for named in kinds.values():
        for of_each, group in groupby(named, lambda call: tuple(counts.get(call, 0) for counts in by_call)):
            alike = list(group)
            found.append(Run(first_to_last(alike), len(alike), of_each))
    return found


def first_to_last(calls: Sequence[str]) -> str:
    """``blocks.0 … blocks.22``."""
    return calls[0] if len(calls) == 1 else f"{calls[0]} … {calls[-1]}"
