"""What `mmdit-optimize` says to people: what was found, fused and left, and the ops before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from mmdit_deploy.cli.plain import plain, titled
from mmdit_deploy.graph.optimize import SUBJECTS, LeftNode, Optimized, PassDone

_LISTED = 20  # nodes of one reason; --json has them all


def text_of(done: Optimized, *, explain: bool) -> str:
    """The text for people.

    Args:
        done: what was done.
        explain: list each node that was left alone, and why.
    """
    target, *others = done.files
    also = [f"and {plain(file.path)} ({file.dialect})" for file in others]
    sections = [
        "\n".join([f"{plain(done.source)} ⇒ {plain(target.path)} ({done.dialect})", *also]),
        _passes(done),
        titled("executed nodes", _ops(done.before, done.after)),
        *(_left(step) for step in done.passes if explain and step.left),
    ]
    return "\n\n".join(section for section in sections if section)


def _passes(done: Optimized) -> str:
    rows = [(s.name, s.found, s.fused, len(s.left)) for s in done.passes if s.found]
    left = sum(len(step.left) for step in done.passes)
    lines = [titled("passes", [("", "found", "fused", "left"), *rows])] if rows else []
    if not rows:
        lines.append(f"nothing to fuse was found by {len(done.passes)} passes")
    elif not any(step.fused for step in done.passes):
        lines.append(f"nothing was fused: each of the {left} places found was left as it is")
    if not any(file.changed for file in done.files):
        lines.append("the graph is unchanged: what was written is a copy")
    if left:
        lines.append("why places were left: --explain")
    return "\n".join(lines)


def _ops(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[object, ...]]:
    """Those that passes are about, which come first, and those of runtimes; of the rest the sum."""
    counts = {op: (before.get(op, 0), after.get(op, 0)) for op in {**before, **after}}
    shown = [op for op in counts if (op in SUBJECTS or "." in op) and any(counts[op])]
    everything = (sum(before.values()), sum(after.values()))
    return [("", "before", "after"), *((op, *counts[op]) for op in shown), ("all nodes", *everything)]


def _left(step: PassDone) -> str:
    lines = [f"left by {step.name!r}: {len(step.left)} of {step.found}"]
    for reason, nodes in _by_reason(step.left):
        lines.append(f"  {plain(reason)}: {len(nodes)}")
        lines += [f"    {plain(where)}" for where in nodes[:_LISTED]]
        if len(nodes) > _LISTED:
            lines.append(f"    … and {len(nodes) - _LISTED} more (--json lists all)")
    return "\n".join(lines)


def _by_reason(left: tuple[LeftNode, ...]) -> Iterator[tuple[str, list[str]]]:
    """Nodes by reason, most first; the value that a reason ends with, in parentheses, is the node's own."""
    groups: dict[str, list[str]] = defaultdict(list)
    for node in left:
        reason, parenthesis, at = node.reason.rpartition(" (")
        has_value = bool(parenthesis) and at.endswith(")")
        where = f"{node.node} in {node.scope}" if node.scope else node.node
        groups[reason if has_value else node.reason].append(f"{where} ({at}" if has_value else where)
    yield from sorted(groups.items(), key=lambda group: -len(group[1]))
