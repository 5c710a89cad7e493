"""Calibration on denoising trajectories: the sampler's steps, in lockstep, in one call's memory, bit for bit."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmdit_deploy.calibration import observe
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.calibration.trajectory import Sample, calibrate_trajectory, default_samples
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.inputs import noise
from mmdit_deploy.families import family_of
from mmdit_deploy.model import Call, MMDiT, calls
from mmdit_deploy.sampling import euler_step, schedule
from mmdit_deploy.spec import ModelSpec

SIZES = ((3, 4, 5), (4, 2, 7))
STEPS = 2


class Counted:
    """Random weights that count how often each tensor is read."""

    def __init__(self) -> None:
        self.description, self.reads = "counted", Counter[str]()
        self._random = RandomWeights(5)

    def part(self, part: Part) -> Tensor:
        self.reads[part.key] += 1
        return self._random.part(part)


def numbers(statistics: Statistics) -> list[object]:
    """Everything that was recorded, to the bit."""
    values = {c: {n: (r.amax, r.rms) for n, r in ranges.items()} for c, ranges in statistics.values.items()}
    layers = {p: (s.channels.tolist(), s.histogram.tolist()) for p, s in statistics.linears.items()}
    return [values, layers, statistics.attentions]


@pytest.fixture(scope="module")
def run(tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]) -> Callable[..., Statistics]:
    def calibrate(name: str = "sd3", seed: int = 1, **options: Any) -> Statistics:
        spec = tiny_models[name]
        samples = default_samples(spec, seed, sizes=SIZES)
        source = options.pop("source", RandomWeights(5))
        return calibrate_trajectory(
            spec, source, torch.float32, samples=samples, steps=STEPS, programs=programs_for(spec), **options
        )

    return calibrate


def test_the_same_seed_gives_the_same_statistics_to_the_bit(run: Callable[..., Statistics]) -> None:
    first = numbers(run(seed=1))
    assert numbers(run(seed=1)) == first
    assert numbers(run(seed=2)) != first


def test_kept_weights_are_read_once_and_change_nothing(run: Callable[..., Statistics]) -> None:
    kept, read_again = Counted(), Counted()
    assert numbers(run(source=kept, keep=True)) == numbers(run(source=read_again, keep=False))
    assert set(kept.reads.values()) == {1}
    # Once a step, for all samples: they go through a call in lockstep.
    assert set(read_again.reads.values()) == {STEPS}


def test_weights_are_kept_where_they_take_half_of_the_memory_that_is_left(tiny_spec: ModelSpec) -> None:
    weights = sum(observe.call_bytes(tiny_spec, observe.PRECISIONS["fp32"]).values())
    for room, fits in ((2 * weights, True), (2 * weights - 1, False)):
        with mock.patch.object(observe, "available_memory", lambda room=room: room):
            assert observe.fits(tiny_spec) is fits


def test_one_calls_weights_are_in_memory_at_a_time(run: Callable[..., Statistics]) -> None:
    alive: list[weakref.ref[Tensor]] = []
    at_once: list[int] = []
    load = EagerCalls.weights

    def weights(self: EagerCalls, call: Call) -> Values:
        at_once.append(sum(ref() is not None for ref in alive))
        loaded = load(self, call)
        alive.extend(map(weakref.ref, loaded.values()))
        return loaded

    with mock.patch.object(EagerCalls, "weights", weights):
        run(keep=False)
    assert len(alive) > 100
    assert set(at_once) == {0}


@pytest.mark.parametrize("name", ["sd3", "flux2"])
def test_steps_are_those_of_the_sampler_and_references_stay(
    name: str, run: Callable[..., Statistics], tiny_models: Mapping[str, ModelSpec], eager_model: Callable[..., MMDiT]
) -> None:
    """The same by hand: the whole model, and one sample after the other."""
    spec = tiny_models[name]
    model = eager_model(spec, RandomWeights(5))
    largest = torch.zeros(spec.img_dim)
    with torch.inference_mode():
        for sample in default_samples(spec, 1, sizes=SIZES):
            state, out = dict(sample.inputs), min(spec.img_dim, spec.out_dim)
            for sigma, sigma_next in pairwise(schedule(STEPS).tolist()):
                tokens = state["hidden_states"].clone()
                largest = torch.maximum(largest, tokens.abs().flatten(0, 1).amax(0))
                state["timestep"] = torch.full((len(tokens),), sigma) * 1000 / spec.time_scale
                velocity = model(**state)[:, : sample.made, :out]
                tokens[:, : sample.made, :out] = euler_step(tokens[:, : sample.made, :out], velocity, sigma, sigma_next)
                state["hidden_states"] = tokens
    seen = run(name).linears["img_embed.proj"].channels
    assert torch.allclose(seen, largest, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux1", "flux2", "qwen-image-edit-2511"])
def test_samples_are_several_prompts_at_several_sizes(name: str, tiny_models: Mapping[str, ModelSpec]) -> None:
    spec = tiny_models[name]
    samples = default_samples(spec)
    assert len({sample.inputs["hidden_states"].shape for sample in samples}) >= 3
    for sample in samples:
        text = sample.inputs["encoder_hidden_states"]
        assert len(text) >= 2 and not torch.equal(text[0], text[1])
        assert sample.inputs["hidden_states"].shape[1] >= sample.made
    with_references = [s for s in samples if s.made < s.inputs["hidden_states"].shape[1]]
    assert bool(with_references) == family_of(spec).references


def test_grids_are_cut_to_the_positions_that_a_model_has(tiny_spec: ModelSpec) -> None:
    small = dataclasses.replace(tiny_spec, pos_max_size=8, pos_base_size=8)
    assert {s.made for s in default_samples(small)} == {64}


def test_progress_counts_all_steps(run: Callable[..., Statistics], tiny_models: Mapping[str, ModelSpec]) -> None:
    told: list[tuple[str, int, int]] = []
    run(progress=lambda *what: told.append(what))
    total = STEPS * len(calls(tiny_models["sd3"]))
    assert [index for _, index, _ in told] == list(range(total))
    assert {count for _, _, count in told} == {total}
    assert told[0][0] == "step 1 of 2: conditioning" and told[-1][0] == "step 2 of 2: final"


def test_noise_is_standard_normal() -> None:
    values = noise(1, "x", (200_000,))
    assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01
    assert abs(float((values.abs() < 1).float().mean()) - 0.6827) < 0.01
    assert abs(float((values.abs() < 2).float().mean()) - 0.9545) < 0.005
    assert torch.equal(values, noise(1, "x", (200_000,))) and not torch.equal(values, noise(2, "x", (200_000,)))


def test_a_sample_is_not_changed(tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]) -> None:
    spec = tiny_models["sd3"]
    (sample,) = default_samples(spec, 1, sizes=SIZES[:1])
    before = Sample({name: t.clone() for name, t in sample.inputs.items()}, sample.made)
    calibrate_trajectory(spec, RandomWeights(5), torch.float32, samples=[sample], steps=1, programs=programs_for(spec))
    assert all(torch.equal(before.inputs[name], t) for name, t in sample.inputs.items())
