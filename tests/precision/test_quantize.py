"""Quantized layers in torch: the formats, the stored tensors, and that they are worth what the schemes say."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from mmdit_deploy.precision import SCHEMES, AttentionScales, LinearPlan, Scheme, stored
from mmdit_deploy.precision.formats import decode, encode, rounded
from mmdit_deploy.precision.quantize import (
    LEAST_SCALE,
    attention_scales,
    dequantize,
    quantize_weight,
    quantized_input,
    scale_of,
    simulate,
    simulate_attention,
)

COMPUTE = (torch.float16, torch.bfloat16)
# Relative L2 error of normal weights. E4M3 has 3 bits of mantissa; of 64 normal values the largest is about 2.5 σ.
WORST = {"fp8": 0.028, "int8": 0.02, "fp4": 0.09, "int4": 0.1}


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """Normal, with rows of unlike sizes, one of zeros."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.logspace(-2, 0, 96).unsqueeze(1)
    rows[7] = 0
    return torch.randn(96, 256, generator=generator) * rows


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 40, 256, generator=generator) * torch.linspace(0.2, 3, 256)


def plan_of(scheme: Scheme, x: Tensor) -> LinearPlan:
    smoothing = 1 / x.abs().flatten(0, 1).amax(0).sqrt() if scheme.smooth else None
    wants = scheme.activations in ("tensor", "block")
    largest = float((x if smoothing is None else x * smoothing).abs().max())
    return LinearPlan(scheme, largest if wants else None, smoothing)


def rel(received: Tensor, expected: Tensor) -> float:
    return float((received - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("form", "dtype"), [("fp8", ml_dtypes.float8_e4m3fn), ("fp4", ml_dtypes.float4_e2m1fn), ("int4", ml_dtypes.int4)]
)
def test_formats_are_those_of_another_implementation(form: str, dtype: type) -> None:
    bits = torch.arange(256 if form == "fp8" else 16, dtype=torch.uint8)
    raw = bits.numpy().view(dtype) if form == "fp8" else bits.numpy().astype(np.int8).astype(np.uint8).view(dtype)
    theirs = torch.from_numpy(raw.astype(np.float32))
    if form == "fp8":
        ours = decode(bits.view(torch.float8_e4m3fn), form)
    else:
        ours = decode((bits | (15 - bits) << 4).unsqueeze(0), form)[0, 0::2]  # the low half comes first
    assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9))


@pytest.mark.parametrize(("form", "dtype"), [("fp8", ml_dtypes.float8_e4m3fn), ("fp4", ml_dtypes.float4_e2m1fn)])
def test_halves_are_rounded_to_even_as_another_implementation_does(form: str, dtype: type) -> None:
    top = 448 if form == "fp8" else 6
    values = torch.cat([torch.arange(-top * 64, top * 64 + 1) / 64, torch.arange(-64, 65) / 2**11])
    theirs = torch.from_numpy(values.numpy().astype(dtype).astype(np.float32))
    assert torch.equal(rounded(values, form), theirs)
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5])
    assert rounded(ties, "int8").tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(
    ("form", "ends"), [("fp8", (-448, 448)), ("int8", (-128, 127)), ("fp4", (-6, 6)), ("int4", (-8, 7))]
)
def test_what_is_out_of_range_saturates_and_nan_stays(form: str, ends: tuple[int, int]) -> None:
    made = rounded(torch.tensor([-1e9, 1e9, -torch.inf, torch.inf]), form)
    assert made.tolist() == [*ends, *ends]
    assert form != "fp8" or rounded(torch.tensor([torch.nan]), form).isnan().all()


@pytest.mark.parametrize("form", ["fp8", "int8", "fp4", "int4"])
def test_what_is_stored_is_read_back(form: str) -> None:
    values = rounded(torch.linspace(-500, 500, 4096).reshape(16, 256), form)
    values[0, :2] = torch.tensor([1.0, -2.0])
    assert torch.equal(decode(encode(values, form), form), values)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tensors_are_those_of_stored(scheme: Scheme, compute: torch.dtype, weight: Tensor, x: Tensor) -> None:
    made = quantize_weight(weight, plan_of(scheme, x), compute)
    expected = [(s.name, s.dtype, s.shape) for s in stored(scheme, *weight.shape, compute)]
    assert [(name, t.dtype, tuple(t.shape)) for name, t in made.items()] == expected
    assert all(t.float().isfinite().all() for name, t in made.items() if name != "weight")
    assert scheme.weights != "int8" or int(made["weight"].min()) == -127  # symmetric


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weights_are_worth_what_the_format_can_tell(
    scheme: Scheme, compute: torch.dtype, weight: Tensor, x: Tensor
) -> None:
    tensors = quantize_weight(weight, plan_of(scheme, x), compute)
    made = dequantize(tensors, scheme)
    assert rel(made, weight) < WORST[scheme.weights] * (1.5 if scheme.smooth else 1)
    small = slice(0, 7)  # rows far below the largest one lose nothing
    assert rel(made[small], weight[small]) < WORST[scheme.weights] * (1.5 if scheme.smooth else 1)
    assert not made[7].any()


@pytest.mark.parametrize("compute", [None, *COMPUTE])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_products_are_those_of_the_quantized_input_and_the_worth_of_the_weights(
    scheme: Scheme, compute: torch.dtype | None, weight: Tensor, x: Tensor
) -> None:
    tensors = quantize_weight(weight, plan_of(scheme, x), compute or torch.float32)
    made = simulate(x, tensors, scheme, compute)
    exact = torch.nn.functional.linear(x, weight)
    assert rel(made, exact) < 1.6 * WORST[scheme.weights]
    if scheme.activations == "none":
        assert rel(made, torch.nn.functional.linear(x, dequantize(tensors, scheme))) < 4e-3


@pytest.mark.parametrize("compute", COMPUTE)
def test_fp8_is_the_formula_of_the_scheme_with_the_rounded_scales(
    compute: torch.dtype, weight: Tensor, x: Tensor
) -> None:
    scheme = SCHEMES["fp8"]
    t = quantize_weight(weight, LinearPlan(scheme, 4.0), compute)
    s_w, s_x, c = t["weight_scale"].double(), t["input_scale"].double(), t["channel_scale"].double()
    codes = (weight.double() / (c * s_w).unsqueeze(1)).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), t["weight"].view(torch.uint8))
    narrow = x.to(compute)
    x8 = (narrow.float() / s_x.float()).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    expected = (s_x * x8) @ (s_w * codes.double()).T * c
    torch.testing.assert_close(simulate(x, t, scheme, compute).double(), expected, rtol=1e-4, atol=1e-5)
    assert float(quantized_input(x, t, scheme).abs().max()) == 448 * float(s_x) < float(x.abs().max())


def test_floats_take_twice_what_calibration_saw_and_lose_nothing(weight: Tensor, x: Tensor) -> None:
    amax = float(x.abs().max())
    for name, loses in (("fp8", False), ("fp4", False), ("int8-tensor", True)):
        scheme = SCHEMES[name]
        smoothing = torch.ones(256) if scheme.smooth else None
        tensors = quantize_weight(weight, LinearPlan(scheme, amax, smoothing), torch.float16)
        seen, unseen = (rel(quantized_input(t, tensors, scheme), t) for t in (x, 1.9 * x))
        assert (unseen > 1.2 * seen) == loses, name


def test_each_token_has_its_own_scale(weight: Tensor, x: Tensor) -> None:
    scheme = SCHEMES["fp8-token"]
    tensors = quantize_weight(weight, LinearPlan(scheme), torch.float16)
    loud = x.clone()
    loud[:, 0] *= 2**6
    made, louder = (quantized_input(t, tensors, scheme) for t in (x, loud))
    assert torch.equal(made[:, 1:], louder[:, 1:])
    assert rel(louder[:, 0], loud[:, 0]) < WORST["fp8"]


def test_nvfp4_has_a_scale_for_each_16_inputs(weight: Tensor, x: Tensor) -> None:
    scheme = SCHEMES["fp4"]
    tensors = quantize_weight(weight, plan_of(scheme, x), torch.float16)
    made = quantized_input(x, tensors, scheme)
    loud = x.clone()
    loud[..., :16] *= 0.25
    assert torch.equal(quantized_input(loud, tensors, scheme)[..., 16:], made[..., 16:])
    scales = tensors["weight_scale"].float()
    assert float(scales[7].max()) == 2.0**-9 and float(scales.max()) <= 448
    exact = quantize_weight(weight, dataclasses.replace(plan_of(scheme, x), input_amax=3 * 448.0), torch.float16)
    assert float(exact["input_scale"]) == 1.0


def test_smoothing_is_undone_by_the_weights(weight: Tensor, x: Tensor) -> None:
    scheme = SCHEMES["int8"]
    spread = torch.logspace(-2, 2, 256)  # what SmoothQuant is for: channels of unlike sizes
    unlike, folded = x * spread, weight / spread
    smooth = quantize_weight(folded, LinearPlan(scheme, pre_quant_scale=1 / spread), torch.float16)
    plain = quantize_weight(folded, LinearPlan(scheme, pre_quant_scale=torch.ones(256)), torch.float16)
    exact = torch.nn.functional.linear(unlike, folded)
    errors = [rel(simulate(unlike, t, scheme), exact) for t in (smooth, plain)]
    assert errors[0] < 0.03 < errors[1]


def test_no_scale_is_below_fp16s_normal_numbers(weight: Tensor) -> None:
    faint = weight * 1e-5
    for name in ("fp8", "fp8-weights", "int8-tensor", "w4a16"):
        scheme = SCHEMES[name]
        plan = LinearPlan(scheme, 1e-9, torch.full((256,), 1e-9) if scheme.smooth else None)
        made = quantize_weight(faint, plan, torch.float16)
        scales = [t for name, t in made.items() if name.endswith("scale")]
        assert min(float(t.min()) for t in scales) >= LEAST_SCALE
    fp8 = quantize_weight(faint[90:], LinearPlan(SCHEMES["fp8-weights"]), torch.float16)
    assert rel(dequantize(fp8, SCHEMES["fp8-weights"]), faint[90:]) < 0.2  # largest 4e-5: its factor is at its least
    assert float(scale_of(0.0, torch.float16)) == LEAST_SCALE


def test_weights_alone_in_fp8_share_their_scale_over_layers(weight: Tensor) -> None:
    made = [quantize_weight(w, LinearPlan(SCHEMES["fp8-weights"]), torch.float16) for w in (weight, weight * 5)]
    assert torch.equal(made[0]["weight_scale"], made[1]["weight_scale"])


@pytest.mark.parametrize(("name", "gain"), [("fp8", 0.99), ("fp4", 0.92), ("w4a16", 0.92)])
def test_searched_scales_beat_those_of_the_largest_value(
    name: str, gain: float, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SCHEMES[name]
    searched = dequantize(quantize_weight(weight, LinearPlan(scheme, 1.0), torch.float16), scheme)
    monkeypatch.setattr("mmdit_deploy.precision.quantize._MULTIPLES", {scheme.weights: (1.0,)})
    largest = dequantize(quantize_weight(weight, LinearPlan(scheme, 1.0), torch.float16), scheme)
    assert rel(searched, weight) < gain * rel(largest, weight)


def test_chunks_of_rows_change_nothing(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LinearPlan(SCHEMES["w4a16"])
    whole = quantize_weight(weight, plan, torch.float16)
    monkeypatch.setattr("mmdit_deploy.precision.quantize._CHUNK", 1000)
    cut = quantize_weight(weight, plan, torch.float16)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("name", ["fp8", "int8", "fp4"])
def test_a_plan_that_lacks_what_calibration_finds_is_refused(name: str, weight: Tensor) -> None:
    with pytest.raises(ValueError, match="the plan has no"):
        quantize_weight(weight, LinearPlan(SCHEMES[name]), torch.float16)


def test_attention_scales_hold_the_share_of_the_head_width() -> None:
    q, k, v = attention_scales(AttentionScales(448.0, 448.0, 896.0), 64, torch.bfloat16)
    assert (float(q), float(k), float(v)) == (2 / 8, 2.0, 4.0)
    assert q.dtype == torch.bfloat16


def test_attention_in_fp8_is_near_the_exact_one() -> None:
    q, k, v = torch.randn(3, 2, 4, 50, 32, generator=torch.Generator().manual_seed(3)).unbind(0)
    scales = attention_scales(AttentionScales(*(float(t.abs().max()) for t in (q, k, v))), 32, torch.float16)
    made = simulate_attention(q, k, v, scales)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert 0.005 < rel(made, exact) < 0.06
