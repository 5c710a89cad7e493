"""Rectified flow: schedules, and the Euler sampler with guidance.

A velocity is any callable, the eager model or an engine, so that both are sampled by the same code:

    velocity = guided_in_one_batch(lambda x, sigma: engine({"hidden_states": x, …})["sample"], scale=4.0)
    image = sample(velocity, noise, schedule(28, shift=3.0))
"""

from mmdit_deploy.sampling.euler import Step, euler_step, sample, trajectory
from mmdit_deploy.sampling.guidance import Velocity, guided, guided_by_two_calls, guided_in_one_batch
from mmdit_deploy.sampling.schedule import dynamic_shift, schedule, shifted, timesteps

__all__ = [
    "Step",
    "Velocity",
    "dynamic_shift",
    "euler_step",
    "guided",
    "guided_by_two_calls",
    "guided_in_one_batch",
    "sample",
    "schedule",
    "shifted",
    "timesteps",
    "trajectory",
]
