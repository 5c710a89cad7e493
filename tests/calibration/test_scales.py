"""amax, percentile and MSE from a histogram; SmoothQuant's factors; what they do to a layer's error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdit_deploy.calibration.scales import input_amax, least_squares, percentile
from mmdit_deploy.calibration.smoothing import smoothing_factors
from mmdit_deploy.calibration.statistics import LinearStatistics
from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.eager.inputs import noise
from mmdit_deploy.precision import SCHEMES, LinearPlan, QuantizationRecipe
from mmdit_deploy.precision.formats import LARGEST, rounded
from mmdit_deploy.precision.quantize import quantize_weight, simulate

RECIPE = QuantizationRecipe.default("int8")


def seen(values: Tensor) -> LinearStatistics:
    """Statistics of values [n, in], which came in three parts."""
    statistics = LinearStatistics(values.shape[1])
    for part in values.chunk(3):
        statistics.add(part)
    return statistics


def heavy_tailed() -> Tensor:
    """Normal values [4096, 8] of which a few are far out."""
    values = noise(1, "values", (4096, 8))
    return values + 40 * (noise(2, "tail", (4096, 8)).clamp(min=4) - 4)


def test_amax_is_the_largest_magnitude() -> None:
    values = heavy_tailed()
    assert input_amax(seen(values), RECIPE, "int8") == float(values.abs().max())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 0.9999])
def test_percentiles_are_those_of_all_magnitudes(share: float) -> None:
    values = heavy_tailed()
    exact = float(torch.quantile(values.abs().flatten().double(), share))
    assert percentile(seen(values), share) == pytest.approx(exact, rel=1 / 32)


def test_the_whole_is_the_largest_magnitude_and_nothing_is_zero() -> None:
    values = heavy_tailed()
    assert percentile(seen(values), 1.0) == float(values.abs().max())
    zeros = LinearStatistics(3)
    zeros.add(torch.zeros(5, 3))
    assert percentile(zeros, 0.99) == zeros.amax == least_squares(zeros, "int8") == 0.0


def squared_error(values: Tensor, clip: float, form: str) -> float:
    scale = clip / LARGEST[form]
    return float((rounded(values / scale, form) * scale - values).square().sum())


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("tailed", [True, False])
def test_mse_finds_the_clip_of_least_error_on_the_values_themselves(form: str, tailed: bool) -> None:
    values = heavy_tailed() if tailed else noise(1, "values", (4096, 8))
    statistics = seen(values)
    found = least_squares(statistics, form)
    best = min(squared_error(values, statistics.amax * 2 ** (-i / 16), form) for i in range(81))
    assert squared_error(values, found, form) <= 1.02 * best
    assert found <= statistics.amax


def test_mse_clips_what_costs_int8_its_steps() -> None:
    values = noise(1, "many", (2**16, 8))
    values[0, 0] = 20.0
    statistics = seen(values)
    found = input_amax(statistics, replace(RECIPE, method="mse"), "int8")
    assert squared_error(values, found, "int8") < 0.5 * squared_error(values, 20.0, "int8")
    assert input_amax(statistics, replace(RECIPE, method="percentile", percentile=99.9), "int8") < found < 20.0


def test_smoothing_follows_the_paper() -> None:
    inputs, weights = torch.tensor([1.0, 16.0, 4.0]), torch.tensor([1.0, 1.0, 0.25])
    for alpha in (0.0, 0.5, 1.0):
        p = smoothing_factors(inputs, weights, alpha)
        s = inputs**alpha / weights ** (1 - alpha)
        assert torch.allclose(p * s, (p * s)[:1].expand(3), rtol=2**-7)  # 1 / s, but for one common factor
        assert float(p.log().mean()) == pytest.approx(0, abs=0.01)


def test_channels_without_values_or_weights_are_left_as_they_are() -> None:
    p = smoothing_factors(torch.tensor([0.0, 4.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert p[[0, 2, 3]].tolist() == [1, 1, 1] and bool(p.isfinite().all())
    assert smoothing_factors(torch.zeros(2), torch.zeros(2)).tolist() == [1, 1]


def test_factors_are_exact_in_16_bits_even_between_extremes() -> None:
    p = smoothing_factors(torch.tensor([1e-30, 1.0, 1e30]), torch.tensor([1e30, 1.0, 1e-30]))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(p.to(dtype).float(), p) and bool((p > 0).all())


def test_smoothing_lowers_the_error_where_a_channel_stands_out() -> None:
    x = noise(3, "x", (256, 64))
    x[:, 5] *= 60
    weight = random_tensor(4, "w", (48, 64), std=0.1)
    errors = {}
    for alpha, p in ((0.5, smoothing_factors(x.abs().amax(0), weight.abs().amax(0))), (None, torch.ones(64))):
        plan = LinearPlan(SCHEMES["int8"], pre_quant_scale=p)
        tensors = quantize_weight(weight, plan, torch.float16)
        exact = x @ weight.T
        errors[alpha] = float((simulate(x, tensors, plan.scheme) - exact).norm() / exact.norm())
    assert errors[0.5] < 0.5 * errors[None]
