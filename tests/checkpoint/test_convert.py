"""Conversion rounds as torch does, and never lets a NaN or an infinity in or out."""

from __future__ import annotations

import pytest
import torch

from mmdit_deploy.checkpoint import convert
from mmdit_deploy.checkpoint.convert import _CHUNK_ELEMENTS, FLOAT_DTYPES
from mmdit_deploy.errors import CheckpointError


@pytest.mark.parametrize("source", FLOAT_DTYPES)
@pytest.mark.parametrize("target", FLOAT_DTYPES)
def test_equals_torch(source: torch.dtype, target: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in [(), (0, 3), (7, 5), (3, _CHUNK_ELEMENTS // 2 + 1)]:
        tensor = torch.randn(shape, generator=generator).to(source)
        result = convert(tensor, target, "w")
        assert result.dtype == target and torch.equal(result, tensor.to(target))
        assert (result is tensor) == (source == target)
    transposed = torch.randn(6, 4, generator=generator).to(source).T
    assert torch.equal(convert(transposed, target, "w"), transposed.to(target))


@pytest.mark.parametrize("source", FLOAT_DTYPES)
@pytest.mark.parametrize("target", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf"), float("-inf")], [float("nan"), float("-inf")]])
def test_not_finite_is_refused_with_counts(source: torch.dtype, target: torch.dtype, bad: list[float]) -> None:
    tensor = torch.ones(_CHUNK_ELEMENTS + 9, dtype=source)
    tensor[-len(bad) :] = torch.tensor(bad, dtype=source)
    nans = sum(value != value for value in bad)
    with pytest.raises(CheckpointError, match=f"'blocks.w'(.|\n)*{nans} NaN and {len(bad) - nans} Inf"):
        convert(tensor, target, "blocks.w")


@pytest.mark.parametrize("pattern", [0x7C01, 0x7E00, 0x7FFF, -0x3FF, -0x200, -1])
def test_every_kind_of_nan_is_seen(pattern: int) -> None:
    tensor = torch.tensor([0, pattern], dtype=torch.int16).view(torch.float16)
    with pytest.raises(CheckpointError, match="1 NaN and 0 Inf"):
        convert(tensor, torch.float16, "w")


def test_overflow_of_fp16_is_refused() -> None:
    fits = torch.tensor([65519.0, -65519.0])  # rounds to 65504
    assert convert(fits, torch.float16, "w").tolist() == [65504.0, -65504.0]
    for source in (torch.float32, torch.bfloat16):
        with pytest.raises(CheckpointError, match=r"'w'(.|\n)*70144(.|\n)*--bf16 or --fp32"):
            convert(torch.tensor([1.0, -70144.0, 66048.0]).to(source), torch.float16, "w")
    with pytest.raises(CheckpointError, match="65520"):
        convert(torch.tensor([65520.0]), torch.float16, "w")


def test_overflow_of_bf16_is_refused() -> None:
    with pytest.raises(CheckpointError, match="--fp32"):
        convert(torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16, "w")


def test_a_later_nan_is_named_before_an_overflow() -> None:
    tensor = torch.full((2 * _CHUNK_ELEMENTS,), 1e9)
    tensor[-1] = float("nan")
    with pytest.raises(CheckpointError, match="1 NaN"):
        convert(tensor, torch.float16, "w")


@pytest.mark.parametrize("source", [torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_other_sources_are_refused(source: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=str(source)):
        convert(torch.zeros(3).to(source), torch.float16, "w")


def test_other_targets_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="float64"):
        convert(torch.zeros(3), torch.float64, "w")


def test_the_source_is_not_changed() -> None:
    tensor = torch.linspace(-3, 3, 1000)
    before = tensor.clone()
    convert(tensor, torch.float16, "w")
    assert torch.equal(tensor, before)
