"""The floor of a block, against counts by hand, and against the model's own weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch

from mmdit_deploy.build.floor import Floor, floors
from mmdit_deploy.model.kinds import joint_block, single_block
from mmdit_deploy.precision import SCHEMES, AttentionScales, LinearPlan, PrecisionPlan, linears, stored
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth

# Small enough to count: 2 samples of 5 image and 3 text tokens, 16 wide, the MLP 32.
SMALL = ModelSpec("small", depth=2, num_heads=2, head_dim=8, mlp_ratio=2, qk_norm=False, bias=False)
FEW = {"batch": 2, "img_tokens": 5, "txt_tokens": 3}
NOTHING = {"batch": 0, "img_tokens": 0, "txt_tokens": 0}
MODULATIONS = 2 * 12 * 16  # of a joint block, for both samples


def difference(more: Floor, less: Floor) -> tuple[int, int]:
    return more.nbytes - less.nbytes, more.flops - less.flops


def test_a_joint_block_of_sd3() -> None:
    """Depth 24, width 1536, batch 2, 4096 + 333 tokens, fp16: the case that engines are judged by."""
    rows, width, hidden = 2 * (4096 + 333), 1536, 6144
    activations = {
        "x": width,
        "QKV written": 3 * width,
        "QKV read": 3 * width,
        "O written": width,
        "O read": width,
        "residual, x written, x read": 3 * width,
        "hidden written and read": 2 * hidden,
        "residual, x written": 2 * width,
    }
    assert sum(activations.values()) == 14 * width + 2 * hidden
    stream = 3 * width**2 + 3 * width + width**2 + width + 2 * width * hidden + hidden + width + 2 * 64
    elements = rows * sum(activations.values()) + 2 * stream + 2 * 12 * width
    flops = 2 * rows * 12 * width**2 + 4 * 2 * (4096 + 333) ** 2 * width
    sizes = {"batch": 2, "img_tokens": 4096, "txt_tokens": 333}
    assert floors(from_depth(24), sizes, 2)["blocks.11"] == Floor(2 * elements, flops) == Floor(712034816, 742609367040)


def test_a_small_joint_block() -> None:
    rows = 2 * (5 + 3)
    elements = rows * (14 * 16 + 2 * 32) + 2 * (4 * 16 * 16 + 2 * 16 * 32) + MODULATIONS
    flops = 2 * rows * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 2 * 8 * 8 * 16
    assert floors(SMALL, FEW, 2)["blocks.0"] == Floor(2 * elements, flops)
    assert floors(SMALL, FEW, 4)["blocks.0"] == Floor(4 * elements, flops)


@pytest.mark.parametrize("text_ends", [True, False])
def test_text_that_goes_no_further_has_keys_and_values_only(text_ends: bool) -> None:
    """Nothing reads its queries, whether the checkpoint has weights for them or not."""
    img, txt = 2 * 5, 2 * 3
    activations = img * (16 + 3 * 16) + txt * (16 + 2 * 16)  # x → Q, K, V and x → K, V
    activations += img * 2 * 16 + (img + txt) * 2 * 16  # Q, O and K, V
    activations += img * (3 * 16 + 16 + 32 + 32 + 2 * 16)
    weights = (4 * 16 * 16 + 2 * 16 * 32) + 2 * 16 * 16
    flops = 2 * img * (4 * 16 * 16 + 2 * 16 * 32) + 2 * txt * 2 * 16 * 16 + 4 * 2 * 5 * 8 * 16
    last = floors(dataclasses.replace(SMALL, text_ends=text_ends), FEW, 2)["blocks.1"]
    assert last == Floor(2 * (activations + weights + 2 * 8 * 16), flops)


def test_swiglu_makes_two_of_what_it_leaves_one_of() -> None:
    swiglu = floors(dataclasses.replace(SMALL, activation="swiglu"), FEW, 2)["blocks.0"]
    more = difference(swiglu, floors(SMALL, FEW, 2)["blocks.0"])
    assert more == (2 * 2 * 16 * 32, 2 * 16 * 16 * 32)  # the weights of the gates, and no activation


def test_a_second_attention_of_the_image() -> None:
    """x is read, and the sum of both written, by the first one's products."""
    dual = floors(dataclasses.replace(SMALL, dual_attention_blocks=(0,)), FEW, 2)["blocks.0"]
    rows = 2 * 5
    elements = rows * (3 * 16 + 4 * 16 + 16) + 4 * 16 * 16 + 2 * 3 * 16
    flops = 2 * rows * 4 * 16 * 16 + 4 * 2 * 5 * 5 * 16
    assert difference(dual, floors(SMALL, FEW, 2)["blocks.0"]) == (2 * elements, flops)


def test_a_residual_of_a_controlnet_is_read() -> None:
    with_residual = floors(dataclasses.replace(SMALL, residuals=1), FEW, 2)["blocks.0"]
    assert difference(with_residual, floors(SMALL, FEW, 2)["blocks.0"]) == (2 * 2 * 5 * 16, 0)


def test_a_single_block() -> None:
    spec = dataclasses.replace(SMALL, single_depth=2, text_ends=False)
    rows = 2 * (5 + 3)
    activations = 16 + (3 * 16 + 32) + 4 * 16 + (16 + 32 + 16) + 16
    elements = rows * activations + 16 * (3 * 16 + 32) + (16 + 32) * 16 + 2 * 3 * 16
    flops = 2 * rows * (16 * (3 * 16 + 32) + (16 + 32) * 16) + 4 * 2 * 8 * 8 * 16
    made = floors(spec, FEW, 2)
    assert list(made) == ["blocks.0", "blocks.1", "single_blocks.0", "single_blocks.1"]
    assert made["single_blocks.0"] == made["single_blocks.1"] == Floor(2 * elements, flops)
    assert made["blocks.1"] == made["blocks.0"]  # the single blocks read its text


def test_positions_masks_and_references_are_read() -> None:
    rope = dataclasses.replace(SMALL, rope_axes=(4, 4), pos_max_size=0)
    plain = floors(SMALL, FEW, 2)["blocks.0"]
    assert difference(floors(rope, FEW, 2)["blocks.0"], plain) == (2 * 8 * 4 * 4, 0)  # fp32, half of a head each
    masked = dataclasses.replace(rope, txt_mask=True)
    assert difference(floors(masked, FEW, 2)["blocks.0"], floors(rope, FEW, 2)["blocks.0"]) == (2 * 2 * 8, 0)
    plain = floors(dataclasses.replace(SMALL, pooled_dim=0, text_ends=False), FEW, 2)["blocks.0"]
    still = dataclasses.replace(SMALL, pooled_dim=0, text_ends=False, still_references=True)
    assert difference(floors(still, FEW, 2)["blocks.0"], plain) == (2 * 2 * 6 * 16 + 5, 0)


def test_each_weight_is_read_once(tiny_families: Mapping[str, ModelSpec]) -> None:
    """Without tokens there are weights alone: those of the modules."""
    for spec in (from_depth(2), *tiny_families.values()):
        made = floors(spec, NOTHING, 1)
        block = joint_block(spec, spec.blocks[0]).build()
        assert made["blocks.0"] == Floor(sum(p.numel() for p in block.parameters()), 0)
        if spec.single_depth:
            block = single_block(spec).build()
            assert made["single_blocks.0"].nbytes == sum(p.numel() for p in block.parameters())


def test_of_some_calls() -> None:
    assert list(floors(SMALL, FEW, 2, ["conditioning", "blocks.1"])) == ["blocks.1"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_are_read_as_they_are_stored(scheme: str) -> None:
    spec = dataclasses.replace(SMALL, num_heads=8, bias=True)  # 64 wide: whole blocks of inputs
    paths = [path for path in linears(spec) if path.startswith("blocks.0.")]
    plan = PrecisionPlan(PRECISIONS["fp16"], {path: LinearPlan(SCHEMES[scheme]) for path in paths})
    weights = 0
    for path in paths:
        rows, columns = linears(spec)[path].shape
        tensors = stored(SCHEMES[scheme], rows, columns, torch.float16)
        weights += sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors if t.shape) + 2 * rows  # and the bias
    assert floors(spec, NOTHING, 2, ["blocks.0"], plan) == {"blocks.0": Floor(weights, 0)}


def test_activations_between_quantized_products_are_as_small_as_they_can_be() -> None:
    """FP8: Q, K and V written and read, O and the hidden activations; x stays in the compute type."""
    scheme = SCHEMES["fp8"]
    paths = [path for path in linears(SMALL) if path.startswith("blocks.0.")]
    linear = PrecisionPlan(PRECISIONS["fp16"], {path: LinearPlan(scheme) for path in paths})
    both = dataclasses.replace(linear, attentions={"blocks.0": (AttentionScales(1, 1, 1),)})
    rows, width, hidden = 2 * (5 + 3), 16, 32
    (plain, quantized, attention) = (floors(SMALL, FEW, 2, ["blocks.0"], p)["blocks.0"] for p in (None, linear, both))
    (full, less) = (floors(SMALL, NOTHING, 2, ["blocks.0"], p)["blocks.0"].nbytes for p in (None, linear))
    activations = plain.nbytes - full, quantized.nbytes - less
    assert activations[0] - activations[1] == rows * (2 * width + 2 * hidden)  # O and hidden, each written and read
    assert quantized.nbytes - attention.nbytes == rows * 2 * 3 * width
    assert plain.flops == quantized.flops == attention.flops
