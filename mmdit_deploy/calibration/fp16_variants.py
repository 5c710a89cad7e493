"""Few variants: blocks whose plans differ a little keep the same values.

    blocks.5  img_out                       blocks.5  img_out, linear_4
    blocks.6  img_out, linear_4        ⇒    blocks.6  img_out, linear_4
    blocks.7  linear_7                      blocks.7  linear_7

Only what lies within a block is shared: what enters and leaves it in fp32 others read as well. A block that keeps
nothing of its own gets nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations

MOST_ADDED = 3  # values that a block keeps for another's sake


def rounded_up(
    wide: Mapping[str, frozenset[str]], functions: Mapping[str, str], borders: Mapping[str, Collection[str]]
) -> dict[str, frozenset[str]]:
    """By call, the values that it keeps: those that it must, and those that make its plan another's.

    Args:
        wide: by call, the values that must stay in fp32.
        functions: by call, the function that it calls.
        borders: by function, the names of its inputs and outputs.
    """
    groups: dict[tuple[str, frozenset[str]], dict[frozenset[str], list[str]]] = {}
    for call, values in wide.items():
        border = values & frozenset(borders[functions[call]])
        if inside := values - border:
            groups.setdefault((functions[call], border), {}).setdefault(inside, []).append(call)
    plans = dict(wide)
    for (_, border), sets in groups.items():
        for inside, members in _merged(sets).items():
            plans.update({call: border | inside for call in members})
    return plans


def _merged(sets: Mapping[frozenset[str], list[str]]) -> dict[frozenset[str], list[str]]:
    """Sets joined in pairs, those that add least first, while that adds few values to each of the calls' own."""
    members = {union: [(call, union) for call in calls] for union, calls in sets.items()}
    while True:
        pairs = [
            (max(len((a | b) - own) for _, own in members[a] + members[b]), sorted(a | b), a, b)
            for a, b in combinations(members, 2)
        ]
        fitting = [pair for pair in pairs if pair[0] <= MOST_ADDED]
        if not fitting:
            return {union: [call for call, _ in calls] for union, calls in members.items()}
        _, _, a, b = min(fitting, key=lambda pair: pair[:2])
        joined = members.pop(a) + members.pop(b)
        members[a | b] = joined + members.pop(a | b, [])
