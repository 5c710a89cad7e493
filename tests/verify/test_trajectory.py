"""The engine's own trajectory beside the eager model's: healthy ones stay together, faulty ones part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import family_of
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verify import Case, Verdict
from mmdit_deploy.verify.bounds import Bounds
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.sampling import Sampler, Start, Stepped, whole_model
from mmdit_deploy.verify.trajectory import sample_both, with_trajectories
from mmdit_deploy.verify.whole import WholeEngine

SEED = 3  # of the bundles' weights
CASE = Case(1, 3, 5, 7, timestep=1000.0)
SAMPLER = Sampler(steps=5, guidance=3.0)


def sampled(copy: Any, **options: Any) -> Verdict:
    """The verdict on a copy with a trajectory, and nothing else but an empty stepping."""
    engine = copy.engine()
    return with_trajectories(
        copy.verify(cases=()), engine, RandomWeights(SEED), options.pop("sampler", SAMPLER), cases=[CASE], **options
    )


def final(verdict: Verdict, level: str = "trajectory") -> Any:
    """The check that the tolerance binds."""
    (check,) = (c for c in verdict.checks if c.level == level and c.binding)
    return check


def test_a_healthy_fp32_engine_stays_beside_the_eager_model(copy_of: Callable[[str], Any]) -> None:
    verdict = sampled(copy_of("fp32"))
    (record,) = verdict.trajectories
    assert len(record.steps) == 5 and all(0 < step.errors.rel_l2 < 1e-5 for step in record.steps)
    assert all(step.errors.cosine > 0.9999999 for step in record.steps)
    assert [step.timestep for step in record.steps] == sorted((s.timestep for s in record.steps), reverse=True)
    assert verdict.passed and final(verdict).name == "final latent"
    image = final(verdict, "image")
    assert image.errors.psnr > 100 and image.errors.ssim > 0.999999
    assert "Euler, 5 steps, shift 3, guidance 3" in verdict.executed[-1] and "the whole engine" in verdict.executed[-1]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_healthy_16_bit_engine_errs_as_the_eager_model_in_that_type_does(
    copy_of: Callable[[str], Any], name: str
) -> None:
    verdict = sampled(copy_of(name))
    assert verdict.passed
    for step in verdict.trajectories[0].steps:
        assert step.floor is not None and step.floor / 4 < step.errors.rel_l2 < 4 * step.floor
    assert 0.25 < final(verdict).times_floor < 4


def test_a_scaled_gate_is_seen_in_the_latent_and_in_the_image(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp32")

    def scale_gate(tensors: dict[str, Tensor]) -> None:
        weight = tensors["transformer_blocks.0.norm1.linear.weight"]
        rows = len(weight) // 6
        weight[2 * rows : 3 * rows] *= 1.5  # shift, scale, gate of the attention; then the MLP's

    copy.edit_weights(scale_gate)
    verdict = sampled(copy)
    assert not verdict.passed
    assert not final(verdict).passed and not final(verdict, "image").passed
    errors = [step.errors.rel_l2 for step in verdict.trajectories[0].steps]
    assert errors == sorted(errors) and errors[-1] > 100 * 4e-5  # they add up


def test_whole_or_call_by_call_held_or_read_again_the_latents_are_the_same(
    copy_of: Callable[[str], Any], tiny_spec: ModelSpec
) -> None:
    copy = copy_of("fp32")
    engine, chain = copy.engine(), calls(tiny_spec)
    start = Start.drawn(tiny_spec, engine.contract, CASE, SAMPLER)
    stepped = EngineCalls(engine.graph, engine.folder, "ort-cpu", torch.float32)
    eager = EagerCalls(tiny_spec, RandomWeights(SEED))
    by_call = Stepped(chain, engine.contract, stepped.load, keep=False)
    held, read_again = (Stepped(chain, engine.contract, eager.load, keep=keep) for keep in (True, False))
    bounds = Bounds(precision("fp32"))
    with WholeEngine(engine) as whole:
        one = sample_both(
            whole_model(whole, engine.contract), held, start, SAMPLER, bounds, how="whole", floor=read_again
        )
    other = sample_both(by_call, read_again, start, SAMPLER, bounds, how="call by call")
    assert torch.equal(one.eager, other.eager) and one.floor is not None and torch.equal(one.floor, one.eager)
    assert torch.allclose(one.engine, other.engine, atol=1e-5)
    assert not torch.equal(one.engine, one.eager)


def test_an_engine_that_is_not_run_whole_samples_call_by_call(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp16")
    engine = copy.engine(whole=False)
    verdict = with_trajectories(
        copy.verify(cases=(), whole=False), engine, RandomWeights(SEED), Sampler(2), cases=[CASE], noise_floor=False
    )
    assert verdict.passed and verdict.trajectories[0].engine.startswith("call by call")
    assert verdict.trajectories[0].steps[0].floor is None and final(verdict).times_floor is None


def test_a_users_decoder_makes_the_image(copy_of: Callable[[str], Any]) -> None:
    seen: list[tuple[int, ...]] = []

    def decode(latent: Tensor) -> Tensor:
        seen.append(tuple(latent.shape))
        return latent.sigmoid()

    verdict = sampled(copy_of("fp32"), decode=decode, sampler=Sampler(2))
    assert set(seen) == {(1, 3, 6, 10)}  # 3 channels, 3 × 5 tokens of 2 × 2
    assert final(verdict, "image").name == "decoded image"
    assert any(words.startswith("LPIPS of the image: ") for words in verdict.not_executed)


def test_the_record_is_json(copy_of: Callable[[str], Any]) -> None:
    data = json.loads(json.dumps(sampled(copy_of("fp16"), sampler=Sampler(2)).to_json()))
    (record,) = data["trajectories"]
    assert [set(step) for step in record["steps"]] == 2 * [{"timestep", "errors", "floor"}]
    image = next(c for c in data["checks"] if c["level"] == "image")
    assert image["errors"]["psnr"] > 40 and "lpips" not in image["errors"]
    assert data["tolerances"][image["bound_by"]]["min_psnr"] == 40.0


def test_guidance_and_steps_are_those_of_the_sampler(tiny_spec: ModelSpec) -> None:
    """A model that says 1 without the prompt and 2 with it, guided by 3, says 4: the noise moves by -4 in all."""
    contract = Contract.of(tiny_spec, precision("fp32"))
    start = Start.drawn(tiny_spec, contract, CASE, Sampler(4, guidance=3.0))
    without, prompt = start.prompts
    assert not torch.equal(without["encoder_hidden_states"], prompt["encoder_hidden_states"])
    asked: list[float] = []

    def model(inputs: Sequence[Values]) -> list[Tensor]:
        assert torch.equal(inputs[0]["encoder_hidden_states"], without["encoder_hidden_states"])
        asked.append(float(inputs[0]["timestep"][0]))
        return [torch.full_like(values["hidden_states"], 1.0 + i) for i, values in enumerate(inputs)]

    *_, last = start.sample(model, Sampler(4, guidance=3.0))
    assert torch.allclose(last.x_next, start.noise - 4, atol=1e-5)
    assert len(asked) == 4 and asked[0] == 1000.0 and asked == sorted(asked, reverse=True)


@pytest.mark.parametrize("name", ["sd3", "flux1", "qwen-image-edit-2511", "sd3-controlnet"])
def test_only_the_latent_moves(name: str, tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec]) -> None:
    """Reference images and channels that only condition stay; what a model says of them is not added."""
    spec = {"sd3": tiny_spec, **tiny_families}[name]
    case = Case(2, 4, 5, 6, timestep=1000.0)
    start = Start.drawn(spec, Contract.of(spec, precision("fp32")), case, Sampler(2))
    given = start.prompts[0]["hidden_states"]
    tokens = 10 if family_of(spec).references else 20
    assert start.noise.shape == (2, tokens, spec.out_dim) and spec.out_dim < spec.img_dim

    def model(inputs: Sequence[Values]) -> list[Tensor]:
        (values,) = inputs
        hidden = values["hidden_states"]
        assert torch.equal(hidden[:, tokens:], given[:, tokens:])
        assert torch.equal(hidden[:, :, spec.out_dim :], given[:, :, spec.out_dim :])
        assert float(values["timestep"][0]) <= 1000 / spec.time_scale
        return [torch.ones_like(hidden)]

    *_, last = start.sample(model, Sampler(2))
    assert torch.allclose(last.x_next, start.noise - 1, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"shift": 0.0}, {"guidance": float("nan")}])
def test_a_sampler_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampler(**wrong)


def test_a_model_whose_output_moves_no_latent_is_refused(tiny_spec: ModelSpec) -> None:
    spec = dataclasses.replace(tiny_spec, out_channels=5)
    with pytest.raises(UsageError, match="whose output moves its input"):
        Start.of(spec, CASE, {})
