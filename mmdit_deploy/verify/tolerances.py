"""How far an engine may be from the eager fp32 model, per precision, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds that bind the final output and each block's local error.

    Args:
        min_cosine: least cosine similarity, over all elements of a tensor.
        max_rel_l2: largest ‖engine − reference‖ / ‖reference‖.
        reason: why these numbers.
    """

    min_cosine: float
    max_rel_l2: float
    reason: str


TOLERANCES = {
    "fp32": Tolerance(
        0.9999999,
        1e-5,
        "the same arithmetic in another order: sums of up to 10^4 products differ by a few times 2^-24",
    ),
    "fp16": Tolerance(
        0.9999,
        5e-3,
        "11 significant bits round each tensor by up to 5e-4; some ten roundings a block add up as a random walk",
    ),
    "bf16": Tolerance(
        0.9995,
        2e-2,
        "8 significant bits round each tensor by up to 4e-3; some ten roundings a block add up as a random walk",
    ),
}
