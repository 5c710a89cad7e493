"""Rectified flow: schedules, and the Euler sampler with guidance.

A velocity is any callable, the eager model or an engine, so that both are sampled by the same code:

    velocity = guided_in_one_batch(lambda x, sigma: engine({"hidden_states": x, …})["sample"], scale=4.0)
    image = sample(velocity, noise, schedule(28, shift=3.0))
"""

from mmdit_deploy.sampling.euler import Step, check_schedule, euler_step, sample, trajectory
from mmdit_deploy.sampling.guidance import (
    Guide,
    Velocity,
    guided,
    guided_by_two_calls,
    guided_in_one_batch,
    guided_keeping_norm,
)
from mmdit_deploy.sampling.patches import patchify, unpatchify
from mmdit_deploy.sampling.schedule import dynamic_shift, schedule, shifted, timesteps

__all__ = [
    "Guide",
    "Step",
    "Velocity",
    "check_schedule",
    "dynamic_shift",
    "euler_step",
    "guided",
    "guided_by_two_calls",
    "guided_in_one_batch",
    "guided_keeping_norm",
    "patchify",
    "sample",
    "schedule",
    "shifted",
    "timesteps",
    "trajectory",
    "unpatchify",
]
