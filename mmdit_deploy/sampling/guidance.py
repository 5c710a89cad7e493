"""Classifier-free guidance (arXiv:2207.12598): away from what the model would do without the prompt.

    v = v_without + scale · (v_with - v_without)

Guided velocities are velocities again, so that a sampler knows nothing of guidance. FLUX.1-dev needs none of this: its
guidance is distilled, and an input of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmdit_deploy.errors import ContractError

# (velocity without the prompt, with it, scale) → the guided one, fp32
Guide = Callable[[Tensor, Tensor, float], Tensor]
# x [B, …] fp32 and the noise level of each sample, sigma [B] fp32 → d x / d sigma, of x's shape and any float type
Velocity = Callable[[Tensor, Tensor], Tensor]


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """The guided velocity, in fp32: a scale above 1 multiplies the rounding errors of 16-bit velocities too.

    Args:
        unconditional: velocity without the prompt.
        conditional: velocity with it, of the same shape.
        scale: 1 for no guidance.
    """
    without = unconditional.to(torch.float32)
    return without + scale * (conditional.to(torch.float32) - without)


def guided_keeping_norm(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """The guided velocity, each token as long as with the prompt alone (diffusers QwenImagePipeline).

    Args:
        unconditional, conditional: [B, tokens, channels].
        scale: 1 for no guidance.
    """
    both, with_prompt = guided(unconditional, conditional, scale), conditional.to(torch.float32)
    return both * (with_prompt.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))


def guided_by_two_calls(
    unconditional: Velocity, conditional: Velocity, scale: float, guide: Guide = guided
) -> Velocity:
    """Guidance in two calls, one without and one with the prompt: half the memory of `guided_in_one_batch`."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return guide(unconditional(x, sigma), conditional(x, sigma), scale)

    return velocity


def guided_in_one_batch(both: Velocity, scale: float, guide: Guide = guided) -> Velocity:
    """Guidance in one call of twice the batch.

    Args:
        both: the velocity of 2·B samples, B without the prompt and then the same B with it.
        scale: 1 for no guidance.
        guide: makes the guided velocity of the two.

    Returns:
        The guided velocity of B samples. It raises ContractError where `both` does not return as many as it got.
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        twice = both(torch.cat([x, x]), torch.cat([sigma, sigma]))
        if len(twice) != 2 * len(x):
            raise ContractError(
                "guidance in one batch gets the velocities without and with the prompt: twice the batch",
                received=f"{len(twice)} for a batch of {len(x)}",
                fix="give the model both text embeddings, those without the prompt first",
            )
        unconditional, conditional = twice.chunk(2)
        return guide(unconditional, conditional, scale)

    return velocity
