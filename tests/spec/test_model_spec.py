"""What a model may be: presets, rules, and refusals that say rule, received and fix."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import pytest

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.errors import MMDiTError, SpecError, UsageError
from mmdit_deploy.families import PRESETS, preset
from mmdit_deploy.spec import PRECISIONS, BlockSpec, ModelSpec, from_depth, precision


def count(spec: ModelSpec) -> int:
    return sum(p.numel for p in parameters(spec))


def assert_says_rule_received_and_fix(error: MMDiTError, received: str) -> None:
    assert error.rule and error.fix and error.received is not None
    assert received in error.received
    assert all(part in str(error) for part in (error.rule, error.received, error.fix))
    assert error.exit_status == 2


@pytest.mark.parametrize(
    ("spec", "billions"),
    [
        (from_depth(24), 2.03),
        (PRESETS["sd3-medium"], 2.03),
        (PRESETS["sd3.5-large"], 8.06),
        (PRESETS["sd3.5-medium"], 2.24),  # its card says 2.5 B: with the position table of 226 million values
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parameter_counts_are_the_published_ones(spec: ModelSpec, billions: float) -> None:
    assert round(count(spec) / 1e9, 2) == billions


def test_qk_norm_is_all_that_parts_depth_24_from_sd3_medium() -> None:
    ours, medium = from_depth(24), PRESETS["sd3-medium"]
    assert count(ours) - count(medium) == 24 * 4 * 64
    assert dataclasses.replace(ours, name=medium.name, qk_norm=False) == medium


def test_the_tables_of_sd35_medium_and_sd3() -> None:
    assert PRESETS["sd3.5-medium"].max_img_tokens == 384**2
    assert PRESETS["sd3.5-large"].max_img_tokens == PRESETS["sd3-medium"].max_img_tokens == 192**2


@pytest.mark.parametrize("depth", [1, 2, 24, 128])
def test_depth_sets_everything(depth: int) -> None:
    spec = from_depth(depth)
    assert (spec.depth, spec.num_heads, spec.width, spec.mlp_width) == (depth, depth, 64 * depth, 256 * depth)
    assert (spec.img_dim, spec.out_dim, spec.txt_dim, spec.pooled_dim) == (64, 64, 4096, 2048)
    assert spec.cond_dim == spec.width and spec.qk_norm and not spec.dual_attention_blocks


@pytest.mark.parametrize("depth", [0, -3, 129, 10_000, "x", "24", 2.0, None, True])
def test_a_depth_that_is_none_is_refused(depth: object) -> None:
    with pytest.raises(SpecError) as caught:
        from_depth(depth)  # type: ignore[arg-type]
    assert_says_rule_received_and_fix(caught.value, repr(depth))
    assert "1 to 128" in caught.value.rule


@pytest.mark.parametrize(
    ("changes", "rule", "received"),
    [
        ({"num_heads": 0}, "num_heads", "0"),
        ({"num_heads": 2.0}, "num_heads", "2.0"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8", "12"),
        ({"txt_dim": -1}, "txt_dim", "-1"),
        ({"patch_size": True}, "patch_size", "True"),
        ({"cond_dim": -8}, "cond_dim", "-8"),
        ({"mlp_ratio": 0}, "mlp_ratio", "0"),
        ({"mlp_ratio": math.nan}, "mlp_ratio", "nan"),
        ({"mlp_ratio": 1.001}, "mlp_ratio", "1.001"),
        ({"dual_attention_blocks": (0, 2)}, "blocks 0 to 1", "[2]"),
        ({"dual_attention_blocks": (-1,)}, "blocks 0 to 1", "[-1]"),
    ],
)
def test_rules(tiny_spec: ModelSpec, changes: dict[str, object], rule: str, received: str) -> None:
    with pytest.raises(SpecError) as caught:
        dataclasses.replace(tiny_spec, **changes)
    assert rule in caught.value.rule
    assert_says_rule_received_and_fix(caught.value, received)


@pytest.mark.parametrize(
    ("family", "changes", "rule", "received"),
    [
        ("flux1", {"rope_axes": (4, 14, 16)}, "their sum is head_dim, 32", "[4, 14, 16]"),
        ("flux1", {"rope_axes": (3, 15, 14)}, "rope_axes are even", "[3, 15, 14]"),
        ("flux1", {"rope_axes": (0, 16, 16)}, "rope_axes are even", "[0, 16, 16]"),
        ("flux1", {"rope_axes": (-2, 18, 16)}, "rope_axes are even", "[-2, 18, 16]"),
        ("flux1", {"rope_axes": ()}, "positions are either added", "pos_max_size 0, rope_axes []"),
        ("flux1", {"pos_max_size": 64}, "positions are either added", "pos_max_size 64, rope_axes [4, 14, 14]"),
        ("sd3-controlnet", {"rope_axes": (16, 16)}, "positions are either added", "pos_max_size 72"),
        ("flux1", {"text_ends": True}, "single blocks read the text stream", "single_depth 4 with text_ends"),
        ("flux1", {"single_depth": 129}, "depth is a whole number from 1 to 128", "129"),
        ("flux1", {"single_depth": -1}, "depth is a whole number", "-1"),
        ("flux1", {"activation": "relu"}, "an activation is gelu or swiglu", "'relu'"),
        ("flux1", {"time_scale": 0.0}, "time_scale is positive", "0.0"),
        ("flux2", {"rope_theta": -1.0}, "rope_theta is positive", "-1.0"),
        ("flux2", {"rope_theta": math.nan}, "rope_theta is positive", "nan"),
        ("flux2", {"mlp_ratio": 2.51}, "mlp_ratio", "2.51"),
        ("qwen-image", {"pooled_dim": -1}, "pooled_dim", "-1"),
        ("qwen-image-edit-2511", {"guidance": True}, "reference tokens at timestep 0", "guidance"),
        ("sd3-controlnet", {"residuals": 5}, "at most one residual per joint block: 1 to 4", "5"),
        ("sd3-controlnet", {"residuals": -1}, "residuals must be a whole number", "-1"),
        ("sd3-controlnet", {"residuals": True}, "residuals must be a whole number", "True"),
    ],
)
def test_rules_of_families(
    tiny_families: Mapping[str, ModelSpec], family: str, changes: dict[str, object], rule: str, received: str
) -> None:
    with pytest.raises(SpecError) as caught:
        dataclasses.replace(tiny_families[family], **changes)
    assert rule in caught.value.rule
    assert_says_rule_received_and_fix(caught.value, received)


def test_blocks_of_families(tiny_families: Mapping[str, ModelSpec]) -> None:
    plain, unread = BlockSpec(), BlockSpec(text_unread=True)
    assert tiny_families["flux1"].blocks == tiny_families["flux2"].blocks == (plain, plain)
    assert tiny_families["qwen-image"].blocks == (plain, unread)
    assert (unread.makes_text, unread.txt_modulations) == (False, 6)  # its modulations are stored, and not all read
    residual = BlockSpec(residual=True)
    assert tiny_families["sd3-controlnet"].blocks == (*[residual] * 3, BlockSpec(text_ends=True))
    assert tiny_families["flux1"].block_names == (
        "blocks.0", "blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2", "single_blocks.3"
    )  # fmt: skip
    assert {name: (spec.attentions, spec.id_axes, spec.max_img_tokens) for name, spec in tiny_families.items()} == {
        "flux1": (6, 3, None),
        "flux2": (5, 4, None),
        "qwen-image": (2, 3, None),
        "qwen-image-edit-2511": (2, 3, None),
        "sd3-controlnet": (4, 2, 72 * 72),
    }


@pytest.mark.parametrize(
    ("depth", "residuals", "taken"),
    [(4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (3, 3, [0, 1, 2]), (3, 1, [0, 0, 0]), (24, 24, [*range(24)])],
)
def test_blocks_share_the_residuals_as_in_diffusers(
    tiny_families: Mapping[str, ModelSpec], depth: int, residuals: int, taken: list[int]
) -> None:
    spec = dataclasses.replace(tiny_families["sd3-controlnet"], depth=depth, residuals=residuals)
    assert [spec.residual_of(i) for i in range(depth)] == taken


def test_block_kinds() -> None:
    spec = ModelSpec("m", depth=4, num_heads=2, dual_attention_blocks=(1, 0, 1))
    dual = BlockSpec(dual_attention=True)
    assert spec.dual_attention_blocks == (0, 1)
    assert spec.blocks == (dual, dual, BlockSpec(), BlockSpec(text_ends=True))
    assert [b.img_modulations for b in spec.blocks] == [9, 9, 6, 6]
    assert [b.txt_modulations for b in spec.blocks] == [6, 6, 6, 2]
    assert [b.attentions for b in spec.blocks] == [2, 2, 1, 1]
    (only,) = ModelSpec("m", depth=1, num_heads=2, dual_attention_blocks=(0,)).blocks
    assert only == BlockSpec(dual_attention=True, text_ends=True)


@pytest.mark.parametrize("spec", [*PRESETS.values(), from_depth(3)], ids=lambda s: s.name)
def test_json_round_trip(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert hash(ModelSpec.from_json(spec.to_json())) == hash(spec)


def test_json_of_another_version_is_refused(tiny_spec: ModelSpec) -> None:
    data = tiny_spec.to_json()
    for broken, received in (({**data, "rope": 1}, "rope"), ({"name": "m", "depth": 1}, "num_heads")):
        with pytest.raises(SpecError) as caught:
            ModelSpec.from_json(broken)
        assert_says_rule_received_and_fix(caught.value, received)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        preset("sd4")
    assert_says_rule_received_and_fix(caught.value, "sd4")
    assert all(name in caught.value.rule for name in PRESETS)
    with pytest.raises(UsageError) as caught:
        precision("fp6")
    assert_says_rule_received_and_fix(caught.value, "fp6")
    with pytest.raises(UsageError) as caught:
        precision("fp8", "fp32")
    assert_says_rule_received_and_fix(caught.value, "fp32")
    assert preset("sd3.5-large") is PRESETS["sd3.5-large"] and precision("bf16") is PRECISIONS["bf16"]
