"""Which noise levels a sampler visits: evenly spaced ones, moved towards noise by a shift.

    x(σ) = (1 - σ) · image + σ · noise          σ from 1, all noise, to 0, the image
    σ'   = s · σ / (1 + (s - 1) · σ)            SD3 paper, arXiv:2403.03206, equation 23

A larger image hides less under the same noise, so that it needs a larger shift s. SD3 takes 3 for 1024² pixels; FLUX
derives it from the number of image tokens ("dynamic shifting"), in the same formula with s = exp(mu).
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from mmdit_deploy.errors import UsageError

TRAINING_STEPS = 1000  # of SD3's and FLUX's noise levels; the scale of timesteps
Level = TypeVar("Level", float, Tensor)


def shifted(sigma: Level, shift: float) -> Level:
    """Noise levels, moved towards noise by a shift above 1. 0 and 1 stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps: int, shift: float = 3.0, *, last: float | None = None, terminal: float | None = None) -> Tensor:
    """The noise levels of a sampler, by default SD3's as diffusers' FlowMatchEulerDiscreteScheduler has them.

    Args:
        steps: calls of the model (two each with guidance by two calls).
        shift: towards noise; 1 for none. FLUX's is `dynamic_shift`.
        last: the noise level of the last call before the shift. SD3's, where not given: its least noise in training,
            which is shifted already, 1/1000 before. FLUX and Qwen-Image take ``1 / steps``.
        terminal: stretch the levels such that the last call has this one (Qwen-Image: 0.02).

    Returns:
        [steps + 1] fp32, falling from 1; the last is 0.

    Raises:
        UsageError: a number is out of its range.
    """
    _require(isinstance(steps, int) and steps >= 1, "a sampler takes at least one step", steps, "e.g. 28")
    _require(0 < shift < math.inf, "a shift is a positive number", shift, "3.0 for SD3, 1.0 for none")
    if last is None:
        last = shifted(1 / TRAINING_STEPS, shift)
    _require(0 < last <= 1, "the last call's noise level is above 0, and at most 1", last, f"e.g. {1 / steps:.3g}")
    # fp64 until the end: one rounding, on any machine.
    sigmas = shifted(torch.tensor(_line(last, steps), dtype=torch.float64, device="cpu"), shift)
    if terminal is not None:
        _require(
            0 < terminal < 1 and steps > 1,
            "a terminal noise level is between 0 and 1, and needs two steps or more",
            f"{terminal} with {steps} steps",
            "leave it out",
        )
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(torch.float32)


def _line(last: float, steps: int) -> list[float]:
    """Numbers evenly spaced from 1 to the last, from both ends.

    torch.linspace rounds once where a CPU has a fused multiply-add, and twice elsewhere.
    """
    if steps == 1:
        return [1.0]
    step = (last - 1) / (steps - 1)
    return [1 + step * i if i < steps // 2 else last - step * (steps - 1 - i) for i in range(steps)]


def dynamic_shift(
    img_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """The shift for an image of that many tokens: exp(mu), mu on the line through two points (FLUX.1-dev's by default).

    Args:
        img_tokens: of the image that is sampled.
        base_tokens, base_mu: the one point.
        max_tokens, max_mu: the other. Larger images lie beyond it, on the same line.

    Raises:
        UsageError: there is no image token, or the points are one above the other.
    """
    _require(img_tokens >= 1, "an image has at least one token", img_tokens, "pass rows · columns of the token grid")
    _require(
        base_tokens != max_tokens,
        "base_tokens and max_tokens are two places on a line",
        base_tokens,
        "take those of the model's scheduler_config.json",
    )
    slope = (max_mu - base_mu) / (max_tokens - base_tokens)
    return math.exp(base_mu + slope * (img_tokens - base_tokens))


def timesteps(sigmas: Tensor, time_scale: float = 1.0) -> Tensor:
    """Noise levels on the scale that a model takes: 0 to 1000 / `ModelSpec.time_scale`. Any shape, fp32."""
    return sigmas.to(torch.float32) * (TRAINING_STEPS / time_scale)


def _require(holds: bool, rule: str, received: object, fix: str) -> None:
    if not holds:
        raise UsageError(rule, received=repr(received), fix=fix)
