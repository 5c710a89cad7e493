"""The Euler sampler of rectified flow: straight on, from one noise level to the next.

    x ← x + (σ_next - σ) · v(x, σ)              for each pair of neighbours in the schedule

The latent stays in fp32 whatever the model's type: what 16 bits lose per step adds up over a trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.sampling.guidance import Velocity


@dataclass(frozen=True)
class Step:
    """One step that was taken.

    Args:
        index: from 0.
        sigma: the noise level of `x`.
        x: before the step, [B, …] fp32.
        velocity: what the model returned, as it did.
        x_next: after the step, [B, …] fp32.
    """

    index: int
    sigma: float
    x: Tensor
    velocity: Tensor
    x_next: Tensor


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One step, in fp32.

    Args:
        x: latent [B, …].
        velocity: d x / d sigma there, of any float type.
        sigma, sigma_next: fp32 noise levels, as in a schedule; their difference is rounded to fp32.

    Raises:
        ContractError: the shapes differ. They are never broadcast.
    """
    if velocity.shape != x.shape:
        raise ContractError(
            f"a velocity has the shape of the latent, {list(x.shape)}",
            received=str(list(velocity.shape)),
            fix="sample a model that returns as many channels as it takes",
        )
    return x.to(torch.float32) + (sigma_next - sigma) * velocity.to(torch.float32)


def trajectory(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Sample step by step: for those who watch, compare or stop.

    Args:
        velocity: the model, called without gradients.
        noise: where to start, [B, …] of any shape: tokens or a latent image.
        sigmas: noise levels [steps + 1], as `schedule` makes them.

    Raises:
        UsageError: the noise levels are no schedule.
        ContractError: a velocity is not of the latent's shape.
    """
    return _steps(velocity, noise.to(torch.float32), check_schedule(sigmas))


def check_schedule(sigmas: Tensor) -> list[float]:
    """The noise levels of a schedule.

    Raises:
        UsageError: they are none.
    """
    levels: list[float] = sigmas.tolist()
    if sigmas.ndim != 1 or len(levels) < 2 or any(not a > b >= 0 for a, b in pairwise(levels)):
        raise UsageError(
            "a schedule is a row of two or more falling noise levels, none below 0",
            received=str(levels),
            fix="mmdit_deploy.sampling.schedule(28)",
        )
    return levels


def _steps(velocity: Velocity, x: Tensor, levels: list[float]) -> Iterator[Step]:
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        everywhere = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        with torch.no_grad():
            v = velocity(x, everywhere)
            x_next = euler_step(x, v, sigma, sigma_next)
        yield Step(index, sigma, x, v, x_next)
        x = x_next


def sample(
    velocity: Velocity, noise: Tensor, sigmas: Tensor, *, progress: Callable[[int, int], object] | None = None
) -> Tensor:
    """Make images from noise.

    Args:
        velocity: the model, called without gradients.
        noise: [B, …] of any shape.
        sigmas: noise levels [steps + 1], as `schedule` makes them.
        progress: called with the steps done and the steps in all, after each.

    Returns:
        The latent at the last noise level, [B, …] fp32.

    Raises:
        UsageError: the noise levels are no schedule.
        ContractError: a velocity is not of the latent's shape.
    """
    x = noise
    for step in trajectory(velocity, noise, sigmas):
        x = step.x_next
        if progress is not None:
            progress(step.index + 1, len(sigmas) - 1)
    return x
