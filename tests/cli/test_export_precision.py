"""The options of precision: what goes together, what does not, and what nothing would come of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEPTH = ("--depth", "2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fp16", "--base", "bf16"], "--base"),
        (["--fp8", "--base", "fp32"], "fp16, bf16"),
        (["--fp16", "--quantize", "mlp=fp8"], "quantized"),
        (["--fp16", "--budget", "rel_l2=0.1"], "--budget"),
        (["--fp8", "--budget", "psnr=30"], "budget"),
        (["--fp8", "--budget", "rel_l2=nan"], "budget"),
        (["--fp8", "--quantize", "mlp"], "role"),
        (["--fp8", "--quantize", "vae=fp8"], "attention, mlp, modulation, embedders, final"),
        (["--fp8", "--quantize", "mlp=fp9"], "scheme"),
        (["--fp8", "--quantize", "mlp=fp4"], "--fp4"),
        (["--fp8", "--quantize", "modulation=fp8"], "modulation"),
        (["--fp8", "--calib-method", "guess"], "method"),
        (["--bf16", "--fp16-plan", "auto"], "--fp16-plan"),
        (["--fp8", "--base", "bf16", "--fp16-plan", "pure"], "--fp16-plan"),
        (["--fp16", "--calib", "nothing.safetensors"], "--calib"),
        (["--fp8", "--calib", "nothing.safetensors"], "nothing.safetensors"),
        (["--fp8", "--scales", "nothing.safetensors"], "nothing.safetensors"),
        (["--fp8", "--scales", "a", "--calib", "b"], "--scales"),
        (["--fp8", "--scales", "a", "--budget", "rel_l2=0.1"], "--scales"),
        (["--fp8", "--graph-only", "--budget", "rel_l2=0.1"], "--graph-only"),
        (["--fp8", "--target", "rtx:sm86"], "sm89"),
        (["--fp8", "--target", "rtx:sm86+sm89"], "sm86"),
        (["--fp4", "--target", "rtx:sm89"], "FP4"),
        (["--int8", "--quantize", "fp8_attention=true", "--target", "rtx:sm86"], "sm89"),
        (["--int8", "--quantize", "modulation=fp8-weights", "--target", "rtx:sm86"], "sm89"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_done(
    run: Callable[..., Any], dist: Path, arguments: list[str], says: str
) -> None:
    result = run("export", *DEPTH, *arguments, "-o", dist / "b")
    assert result.status == 2, result.err
    assert says in result.err and "received:" in result.err and "fix:" in result.err and "Traceback" not in result.err
    assert os.listdir(dist) == []


@pytest.mark.parametrize("precision", ["fp8", "int8", "fp4", "w4a16"])
def test_a_quantized_export_is_planned_without_further_options(
    run: Callable[..., Any], dist: Path, precision: str
) -> None:
    """The default targets can run it, and its weights are smaller."""
    plans = {
        name: run("export", *DEPTH, f"--{name}", "-o", dist / "b", "--dry-run", "--json")
        for name in (precision, "fp16")
    }
    assert all(plan.status == 0 for plan in plans.values()), plans[precision].err
    assert plans[precision].json["weights_bytes"] < 0.9 * plans["fp16"].json["weights_bytes"]
    assert os.listdir(dist) == []


@pytest.mark.usefixtures("room_for_large_models")
def test_a_recipe_says_the_base_of_its_model_whatever_is_quantized(run: Callable[..., Any], dist: Path) -> None:
    for arguments in (("flux1-dev-fp8",), ("flux1-dev-fp8", "--fp4"), ("flux1-dev-bf16", "--fp8")):
        arguments = (*arguments, "--target", "rtx:sm120", "--segments", "12")
        result = run("export", "--recipe", *arguments, "--no-verify", "--dry-run", "-o", dist / "b")
        assert "-bf16, weights" in result.out, result.err


def test_fewer_than_32_tokens_leave_attention_in_16_bit_and_that_is_said(
    run: Callable[..., Any], checkpoint: Path, dist: Path
) -> None:
    few = ("--img-tokens", "4:16:64", "--txt-tokens", "2:8:16")
    result = run("export", checkpoint, "--fp8", *few, "--target", "ort-cpu", "--graph-only", "-o", dist / "b")
    assert result.status == 0 and "attentions stay in fp16" in result.err
