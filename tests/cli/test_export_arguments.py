"""Arguments that contradict each other or name nothing: exit status 2, and nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("depth", ["0", "-3", "x", "10000", "2.5", "", "129", "--3", "9" * 5000])
def test_a_depth_that_is_none(refuse: Callable[..., str], depth: str) -> None:
    refuse(2, [f"--depth={depth}"], "depth is a whole number from 1 to 128")


@pytest.mark.parametrize("option", ["--batch", "--img-tokens", "--txt-tokens"])
@pytest.mark.parametrize("text", ["8:4:16", "4:16:8", "0:4:8", "1:2", "a:b:c", "1:2:3:4", "-1:2:3", "", "1.5"])
def test_a_range_that_is_none(refuse: Callable[..., str], option: str, text: str) -> None:
    refuse(2, ["--depth", "1", f"{option}={text}", "--img-tokens", "4:8:16"][: 5 if "img" not in option else 3])


def test_more_image_tokens_than_positions(refuse: Callable[..., str]) -> None:
    refuse(2, ["--depth", "1", "--img-tokens", "1:1:100000"], "192 × 192 = 36864", "100000")


@pytest.mark.parametrize("names", [["blocks.2"], ["blocks.01"], ["sample"], ["blocks.1", "blocks.1"], ["blocks.-1"]])
def test_an_output_that_is_none(refuse: Callable[..., str], checkpoint: Path, names: list[str]) -> None:
    options = [word for name in names for word in ("--outputs", name)]
    refuse(2, [checkpoint, *options], "blocks.0 to blocks.1, each once", names[0])
    refuse(2, [checkpoint, *options, "--dry-run"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--depth", "1", "--fp16", "--bf16"],
        ["--depth", "1", "--preset", "sd3-medium"],
        ["--depth", "1", "--dry-run", "--graph-only"],
        ["--depth", "1", "--seed", "x"],
        ["--depth", "1", "--fp8", "--int8"],
        ["--depth", "1", "--fp16-plan", "most"],
        ["--depth"],
    ],
)
def test_arguments_that_exclude_each_other(run: Callable[..., Any], dist: Path, arguments: list[str]) -> None:
    result = run("export", *arguments, "-o", dist / "b")
    assert result.status == 2 and "usage: mmdit-export" in result.err and "Traceback" not in result.err
    assert os.listdir(dist) == []


def test_nothing_to_export(refuse: Callable[..., str]) -> None:
    refuse(2, [], "--depth")


def test_a_checkpoint_says_its_depth(refuse: Callable[..., str], checkpoint: Path) -> None:
    refuse(2, [checkpoint, "--depth", "2"], "--depth 2")


@pytest.mark.parametrize("number", ["-1", "x", "1.5", "", "9" * 5000])
def test_a_number_of_residuals_that_is_none(refuse: Callable[..., str], number: str) -> None:
    refuse(2, ["--depth", "2", f"--controlnet={number}"], "--controlnet is a whole number, 1 to 2")
    refuse(2, ["--preset", "flux1-dev", f"--controlnet={number}"], "inputs of Stable Diffusion 3 / 3.5")


@pytest.mark.parametrize("number", ["0", "3"])
def test_more_residuals_than_blocks(refuse: Callable[..., str], number: str) -> None:
    refuse(2, ["--depth", "2", "--controlnet", number], "has 1 to 2 residuals", f"received: {number}", "num_layers")


def test_an_unknown_preset_or_recipe(refuse: Callable[..., str]) -> None:
    refuse(2, ["--preset", "sd4"], "sd3-medium", "'sd4'")
    refuse(2, ["--recipe", "sd4-fp2"], "sd3-medium-fp16")


def test_a_checkpoint_of_another_architecture_than_the_recipes(refuse: Callable[..., str], checkpoint: Path) -> None:
    refuse(2, [checkpoint, "--recipe", "sd3-medium-fp16"], "sd3-medium", "depth 2, expected 24")
    refuse(2, [checkpoint, "--preset", "sd3.5-large"], "num_heads 2, expected 38")
    said = refuse(2, [checkpoint, "--preset", "flux1-dev"], "a Stable Diffusion 3 / 3.5 model; flux1-dev is of FLUX.1")
    assert "depth" not in said and "rope_axes" not in said


def test_an_error_is_a_json_document_too(run: Callable[..., Any], dist: Path) -> None:
    result = run("export", "--depth", "0", "-o", dist / "b", "--json")
    assert result.status == 2
    assert result.json["exit_status"] == 2
    assert set(result.json["error"]) == {"type", "rule", "received", "fix"}
