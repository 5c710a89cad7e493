"""Engines of the other families, built as an export builds them: the gate finds each attention, by its block's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.build.engine_builder import _optimization_profile
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.contract import Range
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec

BuildFamily = Callable[..., tuple[EngineRecord, tuple[EngineLayer, ...]]]
Families = Mapping[str, ModelSpec]


def check_fused(record: EngineRecord, layers: tuple[EngineLayer, ...], spec: ModelSpec) -> None:
    assert record.attention == "fused" and record.fused_attentions == dict.fromkeys(spec.block_names, 1)
    fused = [{call for _, call in layer.sources} for layer in layers if layer.is_fused_attention]
    assert sorted(call for calls in fused for call in calls) == sorted(spec.block_names)


def test_each_attention_is_one_fused_kernel_of_its_block(
    build_family: BuildFamily, tiny_families: Families, family: str
) -> None:
    check_fused(*build_family(family), tiny_families[family])


def test_bf16(build_family: BuildFamily, tiny_families: Families) -> None:
    check_fused(*build_family("flux1", "bf16"), tiny_families["flux1"])


@pytest.mark.parametrize("of", ["flux1", "qwen-image"])
def test_fp32_attention_is_written_out(build_family: BuildFamily, tiny_families: Families, of: str) -> None:
    record, layers = build_family(of, "fp32")
    assert record.attention == "written out" and not any(layer.is_fused_attention for layer in layers)
    assert record.fused_attentions == dict.fromkeys(tiny_families[of].block_names, 0)


@pytest.mark.parametrize(
    ("of", "call", "expected"),
    [
        (
            "flux1",
            "single_blocks.1",
            {
                "single_blocks.0.tokens": ((1, 6, 64), (2, 80, 64), (8, 1280, 64)),
                "single_modulations.1": ((1, 1, 192), (2, 1, 192), (8, 1, 192)),
                "cos": ((6, 16), (80, 16), (1280, 16)),
                "sin": ((6, 16), (80, 16), (1280, 16)),
            },
        ),
        ("qwen-image", "attention_mask", {"encoder_hidden_states_mask": ((1, 2), (2, 16), (8, 256))}),
        ("qwen-image-edit-2511", "final_modulation", {"conditioning": ((2, 40), (4, 40), (16, 40))}),
    ],
)
def test_profiles_of_axes_that_are_sums(
    graphs_of: Callable[..., Graphs],
    tiny_families: Families,
    of: str,
    call: str,
    expected: dict[str, tuple[tuple[int, ...], ...]],
) -> None:
    """What a cut makes an input: both streams' tokens, and a row per sample and one at timestep 0."""
    part = extract_call(graphs_of(tiny_families[of], "fp16").standard, call)
    made: dict[str, tuple[tuple[int, ...], ...]] = {}
    profile = SimpleNamespace(set_shape=lambda name, *shapes: made.update({name: shapes}))
    ranges = {"batch": Range(1, 2, 8), "img_tokens": Range(4, 64, 1024), "txt_tokens": Range(2, 16, 256)}
    _optimization_profile(SimpleNamespace(create_optimization_profile=lambda: profile), part, ranges)
    assert {name: made[name] for name in expected} == expected
