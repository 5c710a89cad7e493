"""Figures of one comparison, in fp64 so that they are right for tensors of any size."""

from __future__ import annotations

import math

from torch import Tensor

from mmdit_deploy.verify.records import Errors
from mmdit_deploy.verify.tolerances import ImageTolerance, Tolerance, bounds_of


def compare(received: Tensor, reference: Tensor) -> Errors:
    """Compare a tensor with its reference, of the same shape.

    Args:
        received: what the engine gave, of any float dtype.
        reference: what the eager model gave; must be finite for the figures to be.

    Raises:
        ValueError: the shapes differ.
    """
    if received.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(received.shape)} and {tuple(reference.shape)}")
    a, b = received.double().flatten(), reference.double().flatten()
    nonfinite = int((~a.isfinite()).sum())
    if nonfinite:
        return Errors(math.nan, math.nan, math.nan, nonfinite)
    difference, norm_a, norm_b = (a - b).norm(), a.norm(), b.norm()
    if norm_b == 0:
        same = bool(norm_a == 0)
        return Errors(1.0 if same else 0.0, 0.0 if same else math.inf, float(a.abs().max()))
    cosine = float(a @ b / (norm_a * norm_b)) if norm_a > 0 else 0.0
    return Errors(cosine, float(difference / norm_b), float((a - b).abs().max()))


def within(errors: Errors, tolerance: Tolerance | ImageTolerance) -> bool:
    """Whether the figures keep all bounds, and all values are finite.

    What is NaN, or has a bound and was not measured, is never within.
    """
    return errors.nonfinite == 0 and all(_keeps(errors, key, bound) for key, bound in bounds_of(tolerance).items())


def _keeps(errors: Errors, key: str, bound: float) -> bool:
    side, _, figure = key.partition("_")
    value: float | None = getattr(errors, figure)
    if value is None:
        return False
    return value >= bound if side == "min" else value <= bound
