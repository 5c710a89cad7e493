"""The flow sampler on an engine is a loop over the eager model with diffusers' scheduler, written out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import AXES, Contract, Range
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.families import position_ids
from mmdit_deploy.model import MMDiT
from mmdit_deploy.runtime import Engine, sample
from mmdit_deploy.sampling import guided_keeping_norm, schedule
from mmdit_deploy.spec import PRECISIONS, ModelSpec

GRID, STEPS, BATCH, TXT_TOKENS = (3, 4), 4, 2, 5
FP32 = {"rtol": 1e-4, "atol": 1e-4}  # four steps and guidance by 4, of a latent of about one


def like_its_input(spec: ModelSpec) -> ModelSpec:
    """The model, with as many channels made as taken."""
    return dataclasses.replace(spec, name=f"{spec.name}-same", out_channels=spec.latent_channels)


def draw(name: str, *shape: int) -> Tensor:
    return random_tensor(5, name, shape, std=1.0)


def noise_for(spec: ModelSpec) -> Tensor:
    return draw("noise", BATCH, math.prod(GRID), spec.out_dim)


def prompt_for(spec: ModelSpec, name: str = "prompt", txt_tokens: int = TXT_TOKENS) -> dict[str, Tensor]:
    prompt = {"encoder_hidden_states": draw(name, BATCH, txt_tokens, spec.txt_dim)}
    if spec.pooled_dim:
        prompt["pooled_projections"] = draw(f"{name} pooled", BATCH, spec.pooled_dim)
    return prompt


@pytest.fixture(scope="module")
def sd3(
    bundle_of: Callable[..., Path], eager_model: Callable[..., MMDiT], tiny_spec: ModelSpec
) -> tuple[Engine, MMDiT]:
    """An fp32 engine of ONNX Runtime, and the eager model with its weights."""
    spec = like_its_input(tiny_spec)
    return Engine.load(bundle_of(spec)), eager_model(spec, RandomWeights(0))


class EagerRunner:
    """The eager model as what an engine runs."""

    device = torch.device("cpu")

    def __init__(self, model: MMDiT):
        self._model = model

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        outputs["sample"].copy_(self._model(**inputs))


@pytest.fixture
def eager_engine(
    eager_model: Callable[..., MMDiT], monkeypatch: pytest.MonkeyPatch
) -> Callable[[ModelSpec], tuple[Engine, MMDiT]]:
    """An engine that runs the eager model, checks and all, and that model: what each family's engines are given."""

    def load(spec: ModelSpec) -> tuple[Engine, MMDiT]:
        model = eager_model(spec, RandomWeights(0))
        monkeypatch.setattr("mmdit_deploy.runtime.engine._open", lambda *_, **__: EagerRunner(model))
        contract = Contract.of(spec, PRECISIONS["fp32"], {axis: Range(1, 8, 64) for axis in AXES})
        bundle: Any = SimpleNamespace(name=spec.name, spec=spec, contract=contract, split=None)
        return Engine(bundle, "ort-cpu"), model

    return load


def by_hand(
    model: MMDiT,
    noise: Tensor,
    scheduler: Any,
    velocity: Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor],
    grids: list[tuple[int, int]],
    **more: Any,
) -> Tensor:
    """diffusers' scheduler around the eager model; `velocity` says which calls a step is made of."""

    def call(hidden_states: Tensor, timestep: Tensor, prompt: Mapping[str, Tensor]) -> Tensor:
        img_ids, txt_ids = map(
            torch.from_numpy, position_ids(model.spec, grids, prompt["encoder_hidden_states"].shape[1])
        )
        return model(hidden_states=hidden_states, timestep=timestep, img_ids=img_ids, txt_ids=txt_ids, **prompt, **more)

    x = noise
    for t in scheduler.timesteps:
        with torch.no_grad():
            v = velocity(call, x, t.expand(len(x)))
        (x,) = scheduler.step(v, t, x, return_dict=False)
    return x


def sd3_scheduler() -> Any:
    judge = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=3.0)
    judge.set_timesteps(STEPS)
    return judge


def unshifted(*, steps: int = STEPS) -> Any:
    judge = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=1.0)
    judge.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    return judge


def test_sd3_without_guidance(sd3: tuple[Engine, MMDiT]) -> None:
    engine, model = sd3
    noise, prompt = noise_for(model.spec), prompt_for(model.spec)
    expected = by_hand(model, noise, sd3_scheduler(), lambda call, x, t: call(x, t, prompt), [GRID])
    received = sample(engine, noise, schedule(STEPS), grid=GRID, prompt=prompt)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received, expected, **FP32)


@pytest.mark.parametrize("one_batch", [True, False, None])
def test_sd3_with_guidance_in_one_batch_and_in_two_calls(
    sd3: tuple[Engine, MMDiT], monkeypatch: pytest.MonkeyPatch, one_batch: bool | None
) -> None:
    """Its conditioning is made once, and not at every step."""
    engine, model = sd3
    noise, prompt, negative = noise_for(model.spec), prompt_for(model.spec), prompt_for(model.spec, "negative")
    conditioned: list[int] = []
    condition = Engine.condition

    def counted(self: Engine, inputs: Any, **options: Any) -> Any:
        conditioned.append(inputs["timestep"].shape[1])
        return condition(self, inputs, **options)

    def velocity(call: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = call(x, t, negative), call(x, t, prompt)
        return without + 4.0 * (with_prompt - without)

    monkeypatch.setattr(Engine, "condition", counted)
    guidance: dict[str, Any] = {"negative": negative, "guidance_scale": 4.0, "one_batch": one_batch}
    received = sample(engine, noise, schedule(STEPS), grid=GRID, prompt=prompt, **guidance)
    torch.testing.assert_close(received, by_hand(model, noise, sd3_scheduler(), velocity, [GRID]), **FP32)
    assert conditioned == ([BATCH, BATCH] if one_batch is False else [2 * BATCH])


def test_texts_of_two_lengths_take_two_calls(sd3: tuple[Engine, MMDiT]) -> None:
    engine, model = sd3
    noise, prompt = noise_for(model.spec), prompt_for(model.spec)
    negative = prompt_for(model.spec, "negative", txt_tokens=3)

    def velocity(call: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = call(x, t, negative), call(x, t, prompt)
        return without + 4.0 * (with_prompt - without)

    guidance: dict[str, Any] = {"prompt": prompt, "negative": negative, "guidance_scale": 4.0}
    received = sample(engine, noise, schedule(STEPS), grid=GRID, **guidance)
    torch.testing.assert_close(received, by_hand(model, noise, sd3_scheduler(), velocity, [GRID]), **FP32)
    with pytest.raises(UsageError, match="one length"):
        sample(engine, noise, schedule(STEPS), grid=GRID, one_batch=True, **guidance)


def test_flux_reads_guidance_and_references(
    eager_engine: Callable[..., tuple[Engine, MMDiT]], tiny_families: Mapping[str, ModelSpec]
) -> None:
    """Timesteps from 0 to 1; the velocity of references moves nothing."""
    engine, model = eager_engine(like_its_input(tiny_families["flux1"]))
    noise, prompt = noise_for(model.spec), prompt_for(model.spec)
    reference, other = (2, 3), (1, 2)
    tokens = [draw(f"reference {g}", BATCH, math.prod(g), model.spec.img_dim) for g in (reference, other)]

    def velocity(call: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        return call(torch.cat([x, *tokens], dim=1), t / 1000, prompt)[:, : x.shape[1]]

    grids = [GRID, reference, other]
    expected = by_hand(model, noise, unshifted(), velocity, grids, guidance=torch.full((BATCH,), 3.5))
    received = sample(
        engine,
        noise,
        schedule(STEPS, 1.0, last=1 / STEPS),
        grid=GRID,
        prompt=prompt,
        guidance=3.5,
        references=list(zip(tokens, grids[1:], strict=True)),
    )
    torch.testing.assert_close(received, expected, **FP32)


@pytest.mark.parametrize("masked", [True, False])
def test_qwen_image_edit_masks_text_and_keeps_the_norm(
    eager_engine: Callable[..., tuple[Engine, MMDiT]], tiny_families: Mapping[str, ModelSpec], masked: bool
) -> None:
    engine, model = eager_engine(like_its_input(tiny_families["qwen-image-edit-2511"]))
    noise, prompt, negative = noise_for(model.spec), prompt_for(model.spec), prompt_for(model.spec, "negative")
    reference = (2, 2)
    tokens = draw("reference", BATCH, 4, model.spec.img_dim)
    mask = torch.ones(BATCH, TXT_TOKENS, dtype=torch.bool)
    mask[1, 3:] = not masked
    given = {"encoder_hidden_states_mask": mask} if masked else {}

    def velocity(call: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = (
            call(torch.cat([x, tokens], dim=1), t / 1000, {**p, "encoder_hidden_states_mask": mask})[:, : x.shape[1]]
            for p in (negative, prompt)
        )
        both = without + 4.0 * (with_prompt - without)  # as in QwenImageEditPipeline.__call__
        return both * (torch.norm(with_prompt, dim=-1, keepdim=True) / torch.norm(both, dim=-1, keepdim=True))

    received = sample(
        engine,
        noise,
        schedule(STEPS, 1.0, last=1 / STEPS),
        grid=GRID,
        prompt={**prompt, **given},
        negative={**negative, **given},
        guidance_scale=4.0,
        guide=guided_keeping_norm,
        references=[(tokens, reference)],
    )
    torch.testing.assert_close(received, by_hand(model, noise, unshifted(), velocity, [GRID, reference]), **FP32)


def test_channels_beside_the_latent_stay(
    eager_engine: Callable[..., tuple[Engine, MMDiT]], tiny_spec: ModelSpec
) -> None:
    """Of a model that takes more than it makes."""
    engine, model = eager_engine(tiny_spec)
    noise, prompt = noise_for(tiny_spec), prompt_for(tiny_spec)
    beside = draw("beside", BATCH, math.prod(GRID), tiny_spec.img_dim - tiny_spec.out_dim)
    expected = by_hand(
        model, noise, sd3_scheduler(), lambda call, x, t: call(torch.cat([x, beside], dim=2), t, prompt), [GRID]
    )
    arguments: dict[str, Any] = {"grid": GRID, "prompt": prompt}
    torch.testing.assert_close(sample(engine, noise, schedule(STEPS), beside=beside, **arguments), expected, **FP32)
    with pytest.raises(UsageError, match=r"beside is \[batch, 12, 4\]"):
        sample(engine, noise, schedule(STEPS), **arguments)


def test_numpy_gives_numpy_and_one_prompt_serves_all(sd3: tuple[Engine, MMDiT]) -> None:
    engine, model = sd3
    noise = noise_for(model.spec)
    prompt = {name: tensor[:1] for name, tensor in prompt_for(model.spec).items()}
    repeated = {name: torch.cat([tensor, tensor]) for name, tensor in prompt.items()}
    arrays = {name: tensor.numpy().astype(np.float16) for name, tensor in prompt.items()}
    of_arrays = {name: torch.from_numpy(a).float() for name, a in arrays.items()}
    expected = sample(engine, noise, schedule(2), grid=GRID, prompt=repeated)
    assert torch.equal(sample(engine, noise, schedule(2), grid=GRID, prompt=prompt), expected)
    received = sample(engine, noise.numpy(), schedule(2), grid=GRID, prompt=arrays)
    assert isinstance(received, np.ndarray)
    assert np.array_equal(received, sample(engine, noise, schedule(2), grid=GRID, prompt=of_arrays).numpy())


def test_a_later_part_of_a_schedule_goes_on_where_the_first_ended(sd3: tuple[Engine, MMDiT]) -> None:
    """So that a latent with some noise is an image to start from."""
    engine, model = sd3
    sigmas, prompt = schedule(STEPS), prompt_for(model.spec)
    whole = sample(engine, noise_for(model.spec), sigmas, grid=GRID, prompt=prompt)
    half = sample(engine, noise_for(model.spec), sigmas[:3], grid=GRID, prompt=prompt)
    assert torch.equal(sample(engine, half, sigmas[2:], grid=GRID, prompt=prompt), whole)


def test_progress_is_told_and_what_was_given_stays(sd3: tuple[Engine, MMDiT]) -> None:
    engine, model = sd3
    told: list[tuple[int, int]] = []
    noise, prompt = noise_for(model.spec), prompt_for(model.spec)
    sample(engine, noise, schedule(3), grid=GRID, prompt=prompt, progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(noise, noise_for(model.spec))
    assert all(torch.equal(tensor, prompt[name]) for name, tensor in prompt_for(model.spec).items())


def without(prompt: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in prompt.items() if n != name}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "no schedule": (lambda p: {"sigmas": torch.tensor([0.0, 1.0])}, "falling noise levels"),
    "another grid": (lambda p: {"grid": (3, 5)}, r"noise of 3 × 5 tokens of tiny-same is \[batch, 15, 16\]"),
    "no pooled text": (lambda p: {"prompt": without(p, "pooled_projections")}, "a prompt for tiny-same is"),
    "an unknown text": (lambda p: {"prompt": {**p, "mask": p["pooled_projections"]}}, "a prompt for tiny-same is"),
    "three prompts": (
        lambda p: {"prompt": {**p, "pooled_projections": torch.zeros(3, 20)}},
        "one sample for all 2, or one for each",
    ),
    "a scale alone": (lambda p: {"guidance_scale": 4.0}, "a negative prompt and a finite scale"),
    "a negative prompt alone": (lambda p: {"negative": p}, "a negative prompt and a finite scale"),
    "an infinite scale": (lambda p: {"negative": p, "guidance_scale": math.inf}, "a finite scale"),
    "guidance that it does not read": (lambda p: {"guidance": 3.5}, "tiny-same reads no guidance"),
    "references": (lambda p: {"references": [(torch.zeros(2, 4, 16), (2, 2))]}, "takes one image"),
    "channels beside": (lambda p: {"beside": torch.zeros(2, 12, 4)}, r"beside is \[batch, 12, 0\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_run(
    sd3: tuple[Engine, MMDiT], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", lambda *_: pytest.fail("it was run"))
    engine, model = sd3
    prompt = prompt_for(model.spec)
    change, words = WRONG[name]
    arguments: dict[str, Any] = {"sigmas": schedule(2), "grid": GRID, "prompt": prompt, **change(prompt)}
    with pytest.raises(UsageError, match=words):
        sample(engine, noise_for(model.spec), **arguments)


def test_a_model_that_reads_guidance_is_given_some(
    eager_engine: Callable[..., tuple[Engine, MMDiT]], tiny_families: Mapping[str, ModelSpec]
) -> None:
    engine, model = eager_engine(like_its_input(tiny_families["flux1"]))
    with pytest.raises(UsageError, match="reads guidance"):
        sample(engine, noise_for(model.spec), schedule(2), grid=GRID, prompt=prompt_for(model.spec))


def test_more_samples_than_the_engine_takes(sd3: tuple[Engine, MMDiT]) -> None:
    engine, model = sd3
    prompt = {name: tensor[:1] for name, tensor in prompt_for(model.spec).items()}
    noise = draw("noise", 5, math.prod(GRID), model.spec.out_dim)
    with pytest.raises(ContractError, match="batch must be 1 to 4"):
        sample(engine, noise, schedule(2), grid=GRID, prompt=prompt)
