"""Per-tensor ranges in streaming memory: what was recorded is what the model computes, whatever went by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mmdit_deploy.calibration.observe import Observer
from mmdit_deploy.calibration.statistics import BINS, LinearStatistics, Statistics, bin_edges
from mmdit_deploy.calibration.trajectory import default_samples
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.program import Program
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.model import calls
from mmdit_deploy.precision import AttentionScales, linears
from mmdit_deploy.precision.structure import unread
from mmdit_deploy.spec import ModelSpec

SIZES = ((3, 4, 5), (4, 2, 7))
FAMILIES = ("sd3", "flux1", "flux2", "qwen-image-edit-2511")


def inputs_of(spec: ModelSpec) -> list[Values]:
    """Two samples in the middle of a trajectory."""
    samples = [sample.inputs for sample in default_samples(spec, 3, sizes=SIZES)]
    return [{**inputs, "timestep": inputs["timestep"] + 400 / spec.time_scale} for inputs in samples]


@dataclass
class Watched:
    """What torch's own hooks see of the eager model, call by call, of one sample.

    Args:
        linears: the input of each linear layer, by path.
        attentions: the largest magnitudes of each attention's operands.
    """

    linears: dict[str, Tensor] = field(default_factory=dict)
    attentions: list[list[float]] = field(default_factory=list)

    def run(self, eager: EagerCalls, spec: ModelSpec, sample: Values) -> Tensor:
        state = dict(sample)
        for call in calls(spec):
            loaded = eager.load(call)
            with self._hooks(loaded.module, call.path):
                made = loaded([state[name] for name in call.inputs])
            state.update(zip(call.outputs, made, strict=True))
        return state["sample"]

    @contextmanager
    def _hooks(self, module: nn.Module, call: str) -> Iterator[None]:
        attend = nn.functional.scaled_dot_product_attention

        def keep(path: str) -> Callable[..., None]:
            return lambda _, args: self.linears.__setitem__(path, args[0])

        def operands(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
            self.attentions.append([float(t.abs().max()) for t in (q, k, v)])
            return attend(q, k, v, **rest)

        layers = [(f"{call}.{name}", m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
        handles = [layer.register_forward_pre_hook(keep(path)) for path, layer in layers]
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", operands):
            yield
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_recorded_is_what_the_model_computes(
    name: str, tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> None:
    spec, source = tiny_models[name], RandomWeights(5)
    observer = Observer(spec, source, torch.float32, programs=programs_for(spec))
    samples, eager = inputs_of(spec), EagerCalls(spec, source)
    made = observer.evaluate(samples)
    watched = [Watched() for _ in samples]
    expected = [w.run(eager, spec, sample) for w, sample in zip(watched, samples, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))

    seen = observer.statistics
    assert set(seen.linears) == set(watched[0].linears) == set(linears(spec)) - unread(spec)
    for path, statistics in seen.linears.items():
        sizes = torch.cat([w.linears[path].abs().flatten(0, -2) for w in watched])
        assert torch.equal(statistics.channels, sizes.amax(0)), path
        assert statistics.amax == float(sizes.max())
        assert torch.equal(statistics.histogram, torch.histogram(sizes.double(), bin_edges()).hist.long()), path

    in_order = [scales for call in calls(spec) for scales in seen.attentions.get(call.path, ())]
    largest = torch.tensor([w.attentions for w in watched]).amax(0).tolist()
    assert in_order == [AttentionScales(*row) for row in largest]
    assert len(in_order) == spec.attentions


def test_values_have_the_names_of_the_graphs_function(
    tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> None:
    spec = tiny_models["flux1"]
    observer = Observer(spec, RandomWeights(5), torch.float32, programs=programs_for(spec))
    samples = inputs_of(spec)
    (velocity, *_) = observer.evaluate(samples[:1])
    values = observer.statistics.values
    assert set(values) == {call.path for call in calls(spec)}
    for call in calls(spec):
        floats = {t.name for t in (*call.kind.inputs, *call.kind.outputs) if t.dtype != "bool"}
        assert floats <= set(values[call.path])
    assert values["final"]["sample"].amax == float(velocity.abs().max())
    assert values["final"]["sample"].rms == pytest.approx(float(velocity.square().mean().sqrt()), rel=1e-6)
    assert values["img_embed"]["hidden_states"].amax == float(samples[0]["hidden_states"].abs().max())
    assert {"linear", "gelu", "scaled_dot_product_attention", "rms_norm"} <= set(values["blocks.0"])


def bytes_held(statistics: Statistics) -> int:
    numbers = sum(len(ranges) for ranges in statistics.values.values())
    tensors = (t for s in statistics.linears.values() for t in (s.channels, s.histogram))
    return 24 * numbers + sum(t.nbytes for t in tensors)


def test_memory_does_not_grow_with_samples_or_tokens(
    tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> None:
    spec = tiny_models["sd3"]
    observer = Observer(spec, RandomWeights(5), torch.float32, programs=programs_for(spec))
    observer.evaluate(inputs_of(spec)[:1])
    before = bytes_held(observer.statistics)
    observer.evaluate([s.inputs for s in default_samples(spec, 3, sizes=((9, 9, 20),) * 3)])
    assert bytes_held(observer.statistics) == before


class Scaled:
    """Random weights of which some are much larger than others."""

    def __init__(self, part_of_key: str, factor: float):
        self.description = "scaled"
        self._random, self._key, self._factor = RandomWeights(5), part_of_key, factor

    def part(self, part: Part) -> Tensor:
        return self._random.part(part) * (self._factor if self._key in part.key else 1.0)


def test_nan_and_inf_of_the_model_are_an_error_that_names_call_and_value(
    tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> None:
    spec = tiny_models["sd3"]
    source = Scaled("transformer_blocks.1.ff.net.2.weight", 3e38)
    observer = Observer(spec, source, torch.float32, programs=programs_for(spec))
    with pytest.raises(CheckpointError, match=r"\d+ Inf of \d+ values in blocks\.1: linear_\d") as error:
        observer.evaluate(inputs_of(spec))
    assert "check the checkpoint" in str(error.value)


def test_a_nan_in_an_input_is_an_error_too(
    tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> None:
    spec = tiny_models["sd3"]
    sample = inputs_of(spec)[0]
    sample["hidden_states"][0, 1, 2] = math.nan
    observer = Observer(spec, RandomWeights(5), torch.float32, programs=programs_for(spec))
    with pytest.raises(CheckpointError, match=r"1 NaN and 0 Inf of .* in img_embed: hidden_states"):
        observer.evaluate([sample])


def test_ranges_beyond_fp16_are_seen_where_an_fp16_graph_would_clip(tiny_families: Mapping[str, ModelSpec]) -> None:
    """FLUX's and Qwen-Image's fp16 graphs clip what a block returns: the plan needs to know what they would clip."""
    spec, statistics = tiny_families["flux1"], Statistics()
    call = next(call for call in calls(spec) if call.path == "single_blocks.0")
    program = Program(call.kind, torch.float16)
    assert "clamp" in program.outputs
    sizes = {"batch": 1, "img_tokens": 4, "txt_tokens": 2}
    activations = {t.name: torch.full(t.shape(sizes), 1e5) for t in call.kind.inputs}
    statistics.run(call, program, activations, EagerCalls(spec, RandomWeights(5)).weights(call))
    assert statistics.values["single_blocks.0"]["tokens_out"].amax > 65504


def test_bins_hold_every_finite_magnitude() -> None:
    statistics, edges = LinearStatistics(4), bin_edges()
    top = torch.finfo(torch.float32).max
    statistics.add(torch.tensor([[0.0, 1e-45, -1.0, 1.5], [top, -top, 65504.0, -0.0]]))
    assert int(statistics.histogram.sum()) == 8
    assert statistics.histogram[0] == 3  # two zeros, and the smallest number there is
    assert statistics.histogram[BINS - 1] == 2
    assert statistics.channels.tolist() == [top, top, 65504.0, 1.5]
    assert (edges.diff() > 0).all() and len(edges) == BINS + 1
