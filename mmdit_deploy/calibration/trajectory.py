"""Calibration on denoising trajectories of the eager model: what its tensors are when it makes images.

    noise ─► step 1: all calls, all samples in lockstep ─► x + Δσ · v ─► step 2: … ─► step N

Several prompts and several sizes, from a seed. The prompts are random tokens: they have no outliers as those of text
encoders have, so that inputs captured from a pipeline (`captured`) are the better choice where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmdit_deploy.calibration.observe import Observer, Progress
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import Values
from mmdit_deploy.eager.inputs import model_inputs, noise, with_reference
from mmdit_deploy.eager.program import Program
from mmdit_deploy.families import Grid
from mmdit_deploy.sampling import euler_step, schedule, timesteps
from mmdit_deploy.spec import PRECISIONS, ModelSpec

STEPS = 8
KEPT_STEPS = (1, 4, 6)  # what errors are measured on where that is asked: early, in the middle and late
SEED = 20_241_115  # of noise and prompts; weights have their own
# Rows, columns and text tokens: square, wide and tall, small enough for a 2 B model on two cores.
SIZES = ((16, 16, 77), (16, 18, 32), (20, 14, 120))
PROMPTS = 2  # at each size


@dataclass(frozen=True)
class Sample:
    """Where one trajectory starts.

    Args:
        inputs: the contract's, fp32; ``hidden_states`` is noise, and the timestep is replaced at every step.
        made: how many image tokens are denoised; those of reference images come after them, and stay.
    """

    inputs: Values
    made: int


def default_samples(
    spec: ModelSpec, seed: int = SEED, *, sizes: Sequence[tuple[int, int, int]] = SIZES, prompts: int = PROMPTS
) -> tuple[Sample, ...]:
    """A batch of prompts at each size, from a seed. Of a model that takes reference images, all but the first have one.

    Args:
        sizes: rows, columns and text tokens; a grid that is larger than the model's positions is cut to them.
        prompts: at each size, with noise of their own.
    """
    return tuple(_sample(spec, seed, index, size, prompts) for index, size in enumerate(sizes))


def _sample(spec: ModelSpec, seed: int, index: int, size: tuple[int, int, int], prompts: int) -> Sample:
    contract = Contract.of(spec, PRECISIONS["fp32"])
    rows, cols = (min(side, contract.max_side or side) for side in size[:2])
    images: list[Grid] = with_reference(spec, rows, cols) if index else [(rows, cols)]

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        key = f"calibration {index} {name}"
        return noise(seed, key, shape) if name == "hidden_states" else random_tensor(seed, key, shape, std=1.0)

    inputs = model_inputs(contract, spec, prompts, images, size[2], torch.zeros(prompts), draw)
    return Sample(inputs, images[0][0] * images[0][1])


def calibrate_trajectory(
    spec: ModelSpec,
    source: WeightSource,
    dtype: torch.dtype,
    *,
    samples: Sequence[Sample] | None = None,
    steps: int = STEPS,
    seed: int = SEED,
    keep: bool | None = None,
    programs: Mapping[str, Program] | None = None,
    visit: Callable[[int, Sequence[Values]], None] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Denoise samples with the eager model in fp32, and take in what it computes.

    Equal arguments give equal statistics, to the bit.

    Args:
        dtype: the compute type that the graph will have.
        samples: `default_samples` of the seed where not given.
        steps: of the Euler sampler, on SD3's schedule.
        keep: whether weights stay in memory between steps; see `Observer`.
        programs: of the model's kinds, where they are traced already.
        visit: called with each step's index and its samples' inputs, which are not to be changed.
        progress: called with the step and the call, the index of the call in all steps, and their number.

    Raises:
        CheckpointError: the model computes NaN or Inf; it names the call and the value.
    """
    sigmas: list[float] = schedule(steps).tolist()
    observer = Observer(spec, source, dtype, keep=keep, programs=programs, progress=_over_steps(progress, steps))
    started = default_samples(spec, seed) if samples is None else samples
    states = [dict(sample.inputs) for sample in started]
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        for state in states:
            state["timestep"] = timesteps(torch.full_like(state["timestep"], sigma), spec.time_scale)
        if visit is not None:
            visit(step, [dict(state) for state in states])
        velocities = observer.evaluate(states)
        for sample, state, velocity in zip(started, states, velocities, strict=True):
            state["hidden_states"] = _denoised(state["hidden_states"], velocity, sample.made, sigma, sigma_next)
    return observer.statistics


def _denoised(tokens: Tensor, velocity: Tensor, made: int, sigma: float, sigma_next: float) -> Tensor:
    """A step of what the model denoises: the image's tokens, and of them the channels that it returns.

    A model may read more channels than it makes: what it is to fill in, or a depth map, stays.
    """
    channels = min(tokens.shape[-1], velocity.shape[-1])
    after = tokens.clone()
    part = after[:, :made, :channels]
    part.copy_(euler_step(part, velocity[:, :made, :channels], sigma, sigma_next))
    return after


def _over_steps(progress: Progress | None, steps: int) -> Progress | None:
    """Progress over all steps, from that of each."""
    if progress is None:
        return None
    at = -1

    def report(call: str, index: int, count: int) -> None:
        nonlocal at
        at += index == 0
        progress(f"step {at + 1} of {steps}: {call}", at * count + index, steps * count)

    return report
