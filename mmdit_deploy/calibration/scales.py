"""Where an input is clipped before it is quantized: one number per linear layer, from what calibration saw of it.

    amax        the largest magnitude: nothing is clipped
    percentile  the magnitude that all but a share stay below
    mse         of the clips from the largest magnitude down to a 32nd of it, the one of least squared error

What lies beyond the clip saturates. Histograms have 32 bins per octave; within a bin magnitudes count as evenly spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit_deploy.calibration.statistics import LinearStatistics, bin_edges
from mmdit_deploy.precision.formats import LARGEST, rounded
from mmdit_deploy.precision.recipe import QuantizationRecipe

_CLIPS = 2.0 ** (-torch.arange(0, 81, dtype=torch.float64) / 16)
_POINTS = (torch.arange(8, dtype=torch.float64) + 0.5) / 8  # within a bin, where its error is taken


def input_amax(statistics: LinearStatistics, recipe: QuantizationRecipe, form: str) -> float:
    """The largest magnitude that a layer is to take, by the recipe's method; an fp32 number.

    Args:
        form: the format that the input is quantized to, one of `mmdit_deploy.precision.formats.LARGEST`.
    """
    if recipe.method == "amax":
        return statistics.amax
    if recipe.method == "percentile":
        found = percentile(statistics, recipe.percentile / 100)
    else:
        found = least_squares(statistics, form)
    return float(torch.tensor(found, dtype=torch.float32))


def percentile(statistics: LinearStatistics, share: float) -> float:
    """The magnitude that this share of all magnitudes, 0 to 1, does not exceed; the largest one for 1."""
    counts, edges = statistics.histogram.double(), bin_edges()
    wanted = share * float(counts.sum())
    reached = counts.cumsum(0)
    # One count may be missing to the rounding of the share.
    index = min(int(torch.searchsorted(reached, wanted)), len(counts) - 1)
    inside = (wanted - float(reached[index] - counts[index])) / max(float(counts[index]), 1.0)
    value = float(edges[index]) + inside * float(edges[index + 1] - edges[index])
    return min(value, statistics.amax)


def least_squares(statistics: LinearStatistics, form: str) -> float:
    """The clip of least squared error; of equal ones the largest."""
    used = statistics.histogram.nonzero().squeeze(1)
    counts, edges = statistics.histogram[used].double(), bin_edges()
    points = edges[used, None] + (edges[used + 1] - edges[used])[:, None] * _POINTS
    points = points.clamp(max=statistics.amax)  # the last bin begins below it and ends above
    clips = _CLIPS * statistics.amax
    errors = torch.stack([_error(points, counts, float(clip), form) for clip in clips])
    return float(clips[int(errors.argmin())])


def _error(points: Tensor, counts: Tensor, clip: float, form: str) -> Tensor:
    """The squared error that a format makes of magnitudes, summed."""
    if clip == 0:
        return counts.new_zeros(())
    scale = clip / LARGEST[form]
    made = rounded((points / scale).float(), form).double() * scale
    return ((made - points).square().mean(1) * counts).sum()
