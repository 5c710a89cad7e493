"""What a TensorRT target's kernels move, in words: a table of its calls, and one of the kernels of a block."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmdit_deploy.cli.plain import in_units, plain, titled
from mmdit_deploy.cli.runs import runs

_LISTED = 40  # kernels of a block; --json has them all
_NAME = 56  # characters of a kernel's name
_NOTES = (
    "bytes: of the layer list, each tensor once, what is dynamic at the opt shape; ≥: some sizes are not known",
    "floor: the least that a block's products and attention read and write, by the spec",
)
_ESTIMATE = "ms: estimate, not measured: a roofline over each kernel, by the bandwidth and dense fp16 rate published"
NOT_RECORDED = "bytes: not recorded by the version that built it; export it again to have them"


def traffic_text(profiles: Sequence[Mapping[str, Any]], calls: Sequence[str], blocks: Collection[str]) -> list[str]:
    """Sections about bytes, FLOPs and estimates, by profile.

    Args:
        profiles: what `describe_traffic` gave.
        calls: of the model, in order.
        blocks: those among them that are blocks: where kernels are listed, one of each kind is shown.
    """
    if not profiles:
        return [NOT_RECORDED]
    sections = []
    for number, profile in enumerate(profiles):
        of = f" of profile {number}" if len(profiles) > 1 else ""
        opt = ", ".join(f"{axis} {size}" for axis, size in profile["opt"].items())
        sections.append(_calls(f"bytes at the opt shape{of} ({opt}), of each call", profile, calls))
        if "kernels" in profile:
            sections += [
                _kernels(f"kernels of {plain(block)}{of}, by bytes", profile, block)
                for block in _shown(profile, calls, blocks)
            ]
    return sections


def _calls(title: str, profile: Mapping[str, Any], calls: Sequence[str]) -> str:
    gpus = list(profile["all"]["seconds"])
    by_call = profile["calls"]
    rows = list(dict.fromkeys(_row(costs, gpus) for costs in by_call.values()))
    number = {call: rows.index(_row(costs, gpus)) + 1 for call, costs in by_call.items()}
    alike = [run for run in runs(calls, number) if run.counts[0]]
    table = [
        ("call", "calls", "read", "weights", "written", "all", "floor", "× floor", "GFLOP", *(f"{g} ms" for g in gpus)),
        *((run.name, run.calls, *rows[run.counts[0] - 1]) for run in alike),
        ("all", "", *_row(profile["all"], gpus)),
    ]
    return "\n".join([titled(title, table), *(f"  {note}" for note in (*_NOTES, *([_ESTIMATE] if gpus else [])))])


def _row(costs: Mapping[str, Any], gpus: Sequence[str]) -> tuple[str, ...]:
    floor = costs.get("floor")
    return (
        *_bytes(costs),
        in_units(floor["bytes"]) if floor else "",
        f"{_least(costs)}{costs['bytes'] / floor['bytes']:.2f}" if floor and floor["bytes"] else "",
        *_work(costs, gpus),
    )


def _bytes(costs: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        *(in_units(costs[name]) for name in ("read", "weights", "written")),
        _least(costs) + in_units(costs["bytes"]),
    )


def _work(costs: Mapping[str, Any], gpus: Sequence[str]) -> tuple[str, ...]:
    seconds = (costs["seconds"][gpu] for gpu in gpus)
    return f"{costs['flops'] / 1e9:.2f}", *("" if s is None else f"{_least(costs)}{s * 1e3:.3f}" for s in seconds)


def _least(costs: Mapping[str, Any]) -> str:
    """What is before a figure that lacks what is not known."""
    return "≥ " if costs["unknown"] else ""


def _shown(profile: Mapping[str, Any], calls: Sequence[str], blocks: Collection[str]) -> list[str]:
    """The first block of the most frequent of each kind: ``blocks.1`` and ``single_blocks.0``."""
    by_call = profile["calls"]
    gpus = list(profile["all"]["seconds"])
    kinds: dict[str, list[str]] = {}
    for call in calls:
        if call in blocks and call in by_call:
            kinds.setdefault(call.rpartition(".")[0], []).append(call)
    shown = []
    for alike in kinds.values():
        rows = [_row(by_call[call], gpus) for call in alike]
        shown.append(alike[rows.index(max(rows, key=rows.count))])
    return shown


def _kernels(title: str, profile: Mapping[str, Any], block: str) -> str:
    gpus = list(profile["all"]["seconds"])
    kernels = sorted((k for k in profile["kernels"] if k["call"] == block), key=lambda k: -int(k["bytes"]))
    rows = [(_cut(k["name"]), k["type"], *_bytes(k), *_work(k, gpus)) for k in kernels[:_LISTED]]
    more = len(kernels) - len(rows)
    header = ("kernel", "type", "read", "weights", "written", "all", "GFLOP", *(f"{gpu} ms" for gpu in gpus))
    return titled(title, [header, *rows]) + (f"\n  and {more} more (--json lists all)" if more else "")


def _cut(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[:_NAME]}…"
