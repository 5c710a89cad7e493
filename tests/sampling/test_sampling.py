"""The sampler makes the steps that diffusers' FlowMatchEulerDiscreteScheduler makes. diffusers is the judge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.sampling import (
    dynamic_shift,
    euler_step,
    guided,
    guided_by_two_calls,
    guided_in_one_batch,
    guided_keeping_norm,
    patchify,
    sample,
    schedule,
    shifted,
    timesteps,
    trajectory,
    unpatchify,
)

STEPS = (1, 2, 4, 28, 50)
FP32_ROUNDING = {"rtol": 1e-6, "atol": 1e-7}


def scheduler(**config: Any) -> Any:
    """diffusers' own."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def noise(shape: tuple[int, ...] = (2, 6, 4), name: str = "noise") -> Tensor:
    """Numbers of every size around one."""
    return random_tensor(3, name, shape, std=1.0)


def swirl(x: Tensor, sigma: Tensor) -> Tensor:
    """A velocity that depends on everything that it is given."""
    return x.flip(1).sin() * (1 + sigma.reshape(-1, *[1] * (x.ndim - 1))) - 0.3 * x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_sd3_visits_the_noise_levels_that_diffusers_does(shift: float, steps: int) -> None:
    judge = scheduler(shift=shift)
    judge.set_timesteps(steps)
    sigmas = schedule(steps, shift)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, judge.sigmas, **FP32_ROUNDING)
    torch.testing.assert_close(timesteps(sigmas[:-1]), judge.timesteps, **FP32_ROUNDING)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("img_tokens", [64, 256, 1024, 4096, 16384])
def test_flux_shifts_by_the_number_of_image_tokens_as_diffusers_does(img_tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    judge = scheduler(shift=3.0, use_dynamic_shifting=True)
    given = [1 - i / steps for i in range(steps)]  # the pipeline's own, 1 to 1 / steps
    judge.set_timesteps(sigmas=given, mu=calculate_shift(img_tokens))
    sigmas = schedule(steps, dynamic_shift(img_tokens), last=1 / steps)
    torch.testing.assert_close(sigmas, judge.sigmas, **FP32_ROUNDING)
    torch.testing.assert_close(timesteps(sigmas[:-1], 1000.0), judge.timesteps / 1000, **FP32_ROUNDING)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_qwen_image_stretches_the_levels_to_a_terminal_one_as_diffusers_does(steps: int) -> None:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    line: dict[str, Any] = {"base_shift": 0.5, "max_shift": 0.9}
    judge = scheduler(use_dynamic_shifting=True, shift_terminal=0.02, **line)
    judge.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=calculate_shift(1024, 256, 8192, 0.5, 0.9))
    shift = dynamic_shift(1024, max_tokens=8192, max_mu=0.9)
    sigmas = schedule(steps, shift, last=1 / steps, terminal=0.02)
    # diffusers stretches in fp32, where 1 - σ of the first levels has lost digits
    torch.testing.assert_close(sigmas, judge.sigmas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_sampler_makes_the_steps_that_diffusers_makes(dynamic: bool) -> None:
    steps = 28
    judge = scheduler(shift=3.0, use_dynamic_shifting=dynamic)
    judge.set_timesteps(steps, mu=1.15 if dynamic else None)
    sigmas = schedule(steps, math.exp(1.15), last=1e-3) if dynamic else schedule(steps)
    x = noise()
    for ours, t in zip(trajectory(swirl, noise(), sigmas), judge.timesteps, strict=True):
        (x,) = judge.step(swirl(x, torch.full((2,), t / 1000)), t, x, return_dict=False)
        torch.testing.assert_close(ours.x_next, x, rtol=1e-5, atol=2e-6)  # rounding adds up over the steps
    assert torch.equal(sample(swirl, noise(), sigmas), ours.x_next)


def test_one_step_from_the_same_latent_is_diffusers_to_fp32_rounding() -> None:
    judge = scheduler(shift=3.0)
    judge.set_timesteps(4)
    sigmas = schedule(4)
    x, v = noise(), noise(name="velocity")
    for i, t in enumerate(judge.timesteps):
        (expected,) = judge.step(v, t, x, return_dict=False)
        ours = euler_step(x, v, sigmas[i].item(), sigmas[i + 1].item())
        torch.testing.assert_close(ours, expected, rtol=3e-7, atol=3e-7)


def test_a_straight_flow_is_sampled_without_error_in_any_number_of_steps() -> None:
    image = noise(name="image")
    for steps in STEPS:
        made = sample(lambda x, sigma: noise() - image, noise(), schedule(steps))
        torch.testing.assert_close(made, image, rtol=1e-5, atol=1e-5)


def test_a_shift_moves_the_levels_towards_noise_and_leaves_the_ends() -> None:
    assert shifted(0.0, 3.0) == 0 and shifted(1.0, 3.0) == 1
    assert shifted(0.5, 3.0) == pytest.approx(0.75)
    assert (schedule(10, 3.0)[1:-1] > schedule(10, 1.0)[1:-1]).all()


def test_the_latent_stays_in_fp32_for_a_velocity_in_16_bit() -> None:
    seen = []

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.dtype, sigma.dtype, tuple(sigma.shape)))
        return swirl(x, sigma).half()

    made = sample(half, noise().half(), schedule(3))
    assert made.dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32, (2,))}


def test_guidance_goes_away_from_what_the_model_does_without_the_prompt() -> None:
    without, with_prompt = torch.tensor([1.0]), torch.tensor([3.0])
    assert guided(without, with_prompt, 1.0) == 3
    assert guided(without, with_prompt, 0.0) == 1
    assert guided(without.half(), with_prompt.half(), 4.0) == 9
    assert guided(without.half(), with_prompt.half(), 4.0).dtype == torch.float32


def test_guidance_in_one_batch_is_guidance_by_two_calls() -> None:
    prompts = noise((2, 1, 4), "prompts")

    def model(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return swirl(x, sigma) + prompt

    nothing = torch.zeros_like(prompts)
    one = guided_in_one_batch(lambda x, sigma: model(x, sigma, torch.cat([nothing, prompts])), 4.0)
    two = guided_by_two_calls(lambda x, sigma: model(x, sigma, nothing), lambda x, sigma: model(x, sigma, prompts), 4.0)
    sigmas = schedule(8)
    torch.testing.assert_close(sample(one, noise(), sigmas), sample(two, noise(), sigmas))


def test_guidance_may_keep_each_tokens_length() -> None:
    without, with_prompt = noise(name="without"), noise(name="with")
    both = guided_keeping_norm(without.half(), with_prompt.half(), 4.0)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both.norm(dim=-1), with_prompt.half().float().norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(both, guided(without.half(), with_prompt.half(), 4.0), dim=-1)
    torch.testing.assert_close(cosine, torch.ones(2, 6))
    two = guided_by_two_calls(lambda x, sigma: without, lambda x, sigma: with_prompt, 4.0, guided_keeping_norm)
    one = guided_in_one_batch(lambda x, sigma: torch.cat([without, with_prompt]), 4.0, guided_keeping_norm)
    assert torch.equal(two(without, torch.ones(2)), one(without, torch.ones(2)))


def test_tokens_are_the_ones_that_diffusers_packs() -> None:
    """A latent becomes tokens, channel, row, column, and a latent again."""
    from diffusers import FluxPipeline

    latent = noise((2, 3, 4, 6), "latent")
    tokens = patchify(latent)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latent, 2, 3, 4, 6))
    assert torch.equal(unpatchify(tokens, (2, 3)), latent)
    assert torch.equal(patchify(unpatchify(noise((2, 6, 27)), (3, 2), 3), 3), noise((2, 6, 27)))


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int]] = []
    sample(swirl, noise(), schedule(3), progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_sampling_needs_no_gradients_and_leaves_the_noise_alone() -> None:
    weight, start = torch.ones(1, requires_grad=True), noise()
    made = sample(lambda x, sigma: x * weight, start, schedule(2))
    assert not made.requires_grad
    assert torch.equal(start, noise())


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"steps": 2, "shift": 0.0},
        {"steps": 2, "shift": math.inf},
        {"steps": 2, "last": 0.0},
        {"steps": 2, "last": 1.5},
        {"steps": 2, "terminal": 1.0},
        {"steps": 1, "terminal": 0.02},
    ],
)
def test_a_number_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="received"):
        schedule(**arguments)


def test_an_image_without_tokens_has_no_shift() -> None:
    with pytest.raises(UsageError, match="at least one token"):
        dynamic_shift(0)
    with pytest.raises(UsageError, match="two places"):
        dynamic_shift(64, base_tokens=4096)


@pytest.mark.parametrize("sigmas", [[1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, -0.5], [[1.0, 0.0]], [math.nan, 0.0]])
def test_what_is_no_schedule_is_refused_before_the_model_is_called(sigmas: list[Any]) -> None:
    def never(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(UsageError, match="falling"):
        trajectory(never, noise(), torch.tensor(sigmas))


def test_a_velocity_of_another_shape_is_refused_and_not_broadcast() -> None:
    with pytest.raises(ContractError, match="shape of the latent"):
        sample(lambda x, sigma: x[:, :, :1], noise(), schedule(2))
    with pytest.raises(ContractError, match="twice the batch"):
        sample(guided_in_one_batch(lambda x, sigma: x[:2], 4.0), noise(), schedule(2))
