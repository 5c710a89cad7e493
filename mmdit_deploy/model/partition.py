"""Where the model is cut into segments: contiguous runs of calls, cut only in front of a block."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from mmdit_deploy.errors import UsageError
from mmdit_deploy.model.calls import Call, calls
from mmdit_deploy.model.mmdit import MMDiT
from mmdit_deploy.spec import ModelSpec, Precision


def call_of(path: str) -> str:
    """The call that a parameter belongs to: ``blocks.3.img.attn_out.weight`` → ``blocks.3``."""
    steps = path.split(".")
    return ".".join(steps[: _DEPTHS.get(steps[0], 1)])


# Steps of a call's path where they are more than one.
_DEPTHS = {
    "blocks": 2,
    "single_blocks": 2,
    "modulations": 3,
    "single_modulations": 2,
    "shared_modulation": 2,
}


def call_bytes(spec: ModelSpec, precision: Precision) -> dict[str, int]:
    """Bytes of weights by call path; 0 where a call has none."""
    with torch.device("meta"):
        model = MMDiT(spec)
    counts = Counter({call.path: 0 for call in calls(spec)})
    for path, parameter in model.named_parameters():
        counts[call_of(path)] += parameter.numel() * precision.itemsize
    return dict(counts)


def partition(chain: Sequence[Call], weights: Mapping[str, int], segments: int) -> tuple[tuple[str, ...], ...]:
    """Group the model's calls into segments, so that the largest one's weights are as few bytes as can be.

    A block's modulations go with the block, what comes before the first block with that block, and the head with the
    last. Of the best groupings it is the one that fills the first segments most.

    Args:
        chain: the model's calls, in order.
        weights: bytes by call path, as `call_bytes` gives them.
        segments: how many, from 1 to the number of blocks.

    Returns:
        Call paths by segment; joined they are those of `chain`.

    Raises:
        UsageError: there are not as many blocks to cut in front of.
    """
    units = _units(chain)
    if not 1 <= segments <= len(units):
        raise UsageError(
            f"a model of {len(units)} blocks is cut into 1 to {len(units)} segments, in front of blocks",
            received=str(segments),
            fix=f"--segments {min(max(segments, 1), len(units))}, or --segments auto",
        )
    sizes = [sum(weights[path] for path in unit) for unit in units]
    # No segment can be smaller than the largest unit, and one of everything is always enough.
    least, most = max(sizes), sum(sizes)
    limit = least + bisect_left(
        range(least, most), True, key=lambda candidate: len(_fill(sizes, candidate)) <= segments
    )
    runs = _fill(sizes, limit, at_least=segments)
    return tuple(tuple(path for i in run for path in units[i]) for run in runs)


def _units(chain: Sequence[Call]) -> list[list[str]]:
    """What is never cut apart, by block: its modulations and itself, and at the ends what has no block.

    What joins or splits the streams goes with the block before it.
    """
    units: list[list[str]] = [[]]
    blocks: list[str] = []
    for call in chain:
        if call.block is not None and call.block not in blocks:
            if blocks:
                units.append([])
            blocks.append(call.block)
        units[-1].append(call.path)
    return units


def _fill(sizes: Sequence[int], limit: int, at_least: int = 1) -> list[list[int]]:
    """Contiguous runs of indices of at most `limit` bytes each, every one as long as can be.

    Args:
        at_least: how many runs; the last ones are cut shorter where the limit alone would give fewer.
    """
    runs: list[list[int]] = []
    filled = 0
    for i, size in enumerate(sizes):
        needed = at_least - len(runs) == len(sizes) - i  # one for each that is left
        if not runs or filled + size > limit or needed:
            runs.append([])
            filled = 0
        runs[-1].append(i)
        filled += size
    return runs
