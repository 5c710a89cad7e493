"""Images from noise with an engine: the flow sampler, over all that the engine reads.

    noise ─► latent ─► [latent; references] ─► engine, without and with the prompt ─► guided velocity ─┐
               ▲                                                                                      │
               └────────────────────────────── Euler step ◄───────────────────────────────────────────┘

Positions, masks and the conditioning of all steps are made once; a step writes the latent, and calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmdit_deploy.contract import CONDITIONING
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import Grid, position_ids
from mmdit_deploy.runtime.engine import Engine
from mmdit_deploy.runtime.sample_inputs import Prompt, hidden_of, joined, latent_of, text_of
from mmdit_deploy.runtime.tensors import Array, to_numpy
from mmdit_deploy.sampling import (
    Guide,
    Velocity,
    check_schedule,
    guided,
    guided_by_two_calls,
    guided_in_one_batch,
    timesteps,
)
from mmdit_deploy.sampling import sample as sample_velocity
from mmdit_deploy.spec import ModelSpec

Latent = TypeVar("Latent", Tensor, np.ndarray)


def sample(
    engine: Engine,
    noise: Latent,
    sigmas: Tensor,
    *,
    grid: Grid,
    prompt: Prompt,
    negative: Prompt | None = None,
    guidance_scale: float | None = None,
    guide: Guide = guided,
    one_batch: bool | None = None,
    guidance: float | None = None,
    references: Sequence[tuple[Array, Grid]] = (),
    beside: Array | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Latent:
    """Make latents from noise. Shapes: B samples, N = rows · cols tokens, C channels.

    Tensors are taken to the engine's device and types, once; a batch of one serves all samples.

    Args:
        engine: of a whole model.
        noise: latent tokens to start from [B, N, C_out]; `mmdit_deploy.sampling.patchify` makes them of latents.
        sigmas: noise levels [steps + 1]: ``schedule(28, shift=3.0)`` for SD3, ``schedule(28, dynamic_shift(N),
            last=1 / 28)`` for FLUX.1-dev; a later part of them continues from a latent of that noise level.
        grid: rows and columns of the image that is made, in tokens.
        prompt: ``encoder_hidden_states`` [B, T, C_txt], and where the model has them ``pooled_projections`` [B, P] and
            ``encoder_hidden_states_mask`` [B, T] bool (by default all tokens count).
        negative: the same without the prompt, for classifier-free guidance.
        guidance_scale: of that guidance.
        guide: how it is applied; Qwen-Image's is `mmdit_deploy.sampling.guided_keeping_norm`.
        one_batch: guidance in one call of 2·B samples or in two of B; by default one where the engine takes as many and
            both texts have one length.
        guidance: that the model itself reads, where it was distilled (FLUX.1-dev: 3.5).
        references: tokens [B, N_ref, C_in] and grid of each image that is to be edited, for models that take any.
        beside: channels that go in with the latent's and stay as they are [B, N, C_in - C_out], for models that take
            more channels than they make (FLUX.1 Fill).
        progress: called with the steps done and the steps in all, after each.

    Returns:
        The latent tokens at the last noise level, [B, N, C_out] fp32: a numpy array where the noise is one, else a
        torch tensor on the engine's device.

    Raises:
        UsageError: the arguments do not fit each other or the model; nothing was run.
        ContractError: the engine does not take these sizes.
    """
    spec = engine.bundle.spec
    check_schedule(sigmas)
    _check_model(spec, guidance)
    _check_guidance(negative, guidance_scale)
    latent = latent_of(engine, noise, grid)
    start = hidden_of(engine, latent, references, beside)
    grids = [grid, *(g for _, g in references)]
    levels = timesteps(sigmas[:-1], spec.time_scale)

    def calls(text: Mapping[str, Tensor]) -> Velocity:
        return _calls(engine, start, latent, text, grids, levels, guidance)

    with_prompt = text_of(engine, prompt, len(latent))
    if negative is None or guidance_scale is None:
        velocity = calls(with_prompt)
    else:
        without = text_of(engine, negative, len(latent))
        if _in_one_batch(engine, start.shape[1], without, with_prompt) if one_batch is None else one_batch:
            both = calls(joined(without, with_prompt))
            velocity = guided_in_one_batch(both, guidance_scale, guide)
        else:
            velocity = guided_by_two_calls(calls(without), calls(with_prompt), guidance_scale, guide)
    made: Any = sample_velocity(velocity, latent, sigmas, progress=progress)
    return to_numpy(made.cpu()) if isinstance(noise, np.ndarray) else made


def _calls(
    engine: Engine,
    start: Tensor,
    latent: Tensor,
    text: Mapping[str, Tensor],
    grids: Sequence[Grid],
    levels: Tensor,
    guidance: float | None,
) -> Velocity:
    """The engine with one text, as a velocity that is called once for each step, in order.

    Args:
        start: the engine's ``hidden_states``, of which the latent is the first tokens and channels.
        levels: timesteps [steps].
    """
    batch, txt_tokens = text["encoder_hidden_states"].shape[:2]
    img_ids, txt_ids = position_ids(engine.bundle.spec, grids, txt_tokens)
    hidden = start.repeat(batch // len(start), 1, 1)
    known = {
        **text,
        "hidden_states": hidden,
        "img_ids": torch.from_numpy(img_ids).to(engine.device),
        "txt_ids": torch.from_numpy(txt_ids).to(engine.device),
        "timestep": levels.to(engine.device)[:, None].repeat(1, batch),
        "guidance": torch.full((batch,), guidance or 0.0, dtype=torch.float32, device=engine.device),
    }
    inputs = {t.name: known[t.name] for t in engine.contract.inputs}
    steps = iter(engine.condition({name: t for name, t in inputs.items() if name in CONDITIONING}))
    others = {name: t for name, t in inputs.items() if name not in CONDITIONING}
    part = (slice(None), slice(latent.shape[1]), slice(latent.shape[2]))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        hidden[part] = x
        return engine(others, conditioning=next(steps))["sample"][part]

    return velocity


def _in_one_batch(
    engine: Engine, img_tokens: int, without: Mapping[str, Tensor], with_prompt: Mapping[str, Tensor]
) -> bool:
    """Whether both texts have one length, and a profile of the engine holds both at once."""
    if any(tensor.shape != with_prompt[name].shape for name, tensor in without.items()):
        return False
    batch, txt_tokens = without["encoder_hidden_states"].shape[:2]
    sizes = {"batch": 2 * batch, "img_tokens": img_tokens, "txt_tokens": txt_tokens}
    profiles = engine.contract.profiles
    return any(all(p[axis].min <= size <= p[axis].max for axis, size in sizes.items()) for p in profiles)


def _check_model(spec: ModelSpec, guidance: float | None) -> None:
    if spec.out_dim > spec.img_dim:
        raise UsageError(
            "a model is sampled whose output moves its input",
            received=f"{spec.name} takes {spec.img_dim} channels and makes {spec.out_dim}",
            fix="call the engine yourself",
        )
    if spec.residuals:
        raise UsageError(
            "a ControlNet's residuals differ from step to step, and are not made here",
            received=f"{spec.name}, which reads {spec.residuals}",
            fix="mmdit_deploy.sampling.sample with a velocity of your own",
        )
    if spec.guidance != (guidance is not None):
        raise UsageError(
            f"{spec.name} {'reads' if spec.guidance else 'reads no'} guidance",
            received=f"guidance={guidance}",
            fix="e.g. guidance=3.5"
            if spec.guidance
            else "guidance_scale=… with negative=… is classifier-free guidance",
        )


def _check_guidance(negative: Prompt | None, scale: float | None) -> None:
    if (negative is None) != (scale is None) or (scale is not None and not math.isfinite(scale)):
        raise UsageError(
            "classifier-free guidance has a negative prompt and a finite scale",
            received=f"negative={'None' if negative is None else '…'}, guidance_scale={scale}",
            fix="pass both, or neither",
        )
