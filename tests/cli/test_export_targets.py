"""Targets, segments and profiles that cannot be: 2 where the arguments decide it, 3 where this machine does."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_an_unknown_target(refuse: Callable[..., str]) -> None:
    refuse(2, ["--depth", "1", "--target", "tpu"], "ort-cpu", "'tpu'")


@pytest.mark.parametrize(
    ("targets", "precision", "words"),
    [
        (["rtx:sm90"], "fp16", ["TensorRT-RTX builds for sm75", "sm121", "sm90", "--target trt"]),
        (["rtx:sm89+sm61"], "fp16", ["TensorRT-RTX builds for", "sm61", "--target rtx:sm89"]),
        (["rtx:"], "fp16", ["a target is one of", "'rtx:'"]),
        (["ort-cpu", "rtx:sm75+sm89"], "bf16", ["bf16 needs", "sm80 or later", "rtx:sm75+sm89", "--fp16"]),
    ],
)
def test_a_gpu_that_no_engine_can_be_built_for(
    refuse: Callable[..., str], targets: list[str], precision: str, words: list[str]
) -> None:
    """Arguments alone decide it, so it is none of this machine's business: also where nothing is installed."""
    options = [word for target in targets for word in ("--target", target)]
    refuse(2, ["--depth", "1", f"--{precision}", *options], *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--segments", "99"], ["1 to 2 segments", "99", "--segments 2"]),
        (["--segments", "0"], ["1 to 2 segments", "--segments 1"]),
        (["--segments", "two"], ["a whole number or auto", "'two'"]),
        (["--segments=-1"], ["a whole number or auto", "'-1'"]),
        (["--segments", "9" * 5000], ["a whole number or auto"]),
        (["--profile", "batch=3"], ["a profile's batch lies within its range, 1:1:2", "3:3:3", "widen --batch"]),
        (["--profile", "img_tokens=1:4:8"], ["a profile's img_tokens", "widen --img-tokens"]),
        (["--profile", "batch=2:1:2"], ["1 ≤ MIN ≤ OPT ≤ MAX", "2:1:2"]),
        (["--profile", "batch=1,batch=2"], ["each once", "'batch=1,batch=2'"]),
        (["--profile", "height=64"], ["batch, img_tokens, txt_tokens", "'height=64'"]),
        (["--profile", "batch"], ["e.g. --profile batch=2"]),
        (["--profile", ""], ["e.g. --profile batch=2"]),
    ],
)
@pytest.mark.parametrize("stop", [[], ["--dry-run"]])
def test_segments_and_profiles_that_cannot_be(
    refuse: Callable[..., str], checkpoint: Path, arguments: list[str], words: list[str], stop: list[str],
    tensorrt_rtx: None,
) -> None:  # fmt: skip
    refuse(2, [checkpoint, "--target", "rtx:sm89", *arguments, *stop], *words)


@pytest.mark.parametrize("arguments", [["--segments", "2"], ["--profile", "batch=1"]])
def test_segments_and_profiles_are_tensorrts(
    refuse: Callable[..., str], checkpoint: Path, arguments: list[str]
) -> None:
    refuse(2, [checkpoint, *arguments], arguments[0], "with ort-cpu", "add a TensorRT target")


def test_segments_where_nothing_is_built(refuse: Callable[..., str], checkpoint: Path) -> None:
    arguments = ["--target", "rtx:sm89", "--segments", "2", "--graph-only"]
    refuse(2, [checkpoint, *arguments], "--segments 2 with --graph-only", "drop one of them")


def test_what_the_arguments_decide_goes_before_what_is_installed(
    refuse: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refuse(2, [checkpoint, "--target", "rtx:sm89", "--segments", "99"], "1 to 2 segments")


def test_an_engine_for_this_machines_gpu_where_there_is_none(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether TensorRT is installed or not: it is said before anything is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments: list[str | Path] = ["--depth", "1", "--target", "trt"]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refuse(3, arguments, "the target trt needs the package 'tensorrt'", "pip install 'mmdit-deploy[trt]'")
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    refuse(3, arguments, "torch finds no GPU here", "--target rtx:sm89")


def test_tensorrt_rtx_is_missed_by_the_name_of_its_extra(
    refuse: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr("mmdit_deploy.export.pipeline.build_graphs", lambda *_, **__: pytest.fail("said too late"))
    for stop in ([], ["--no-verify"], ["--dry-run"]):
        refuse(3, [checkpoint, "--target", "rtx:sm89", *stop], "pip install 'mmdit-deploy[rtx]'")


def test_a_gpu_target_without_a_gpu(refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    refuse(3, ["--depth", "1", "--target", "ort-cuda"], "CUDAExecutionProvider", "--no-verify")


@pytest.mark.usefixtures("tensorrt_rtx")
def test_the_conditioning_of_a_model_in_two_parts_is_a_stage_of_its_own(run: Callable[..., Any]) -> None:
    arguments = ("export", "--depth", "2", "--target", "rtx:sm89", "--no-verify", "--dry-run", "--json")
    for more, conditioning in (((), []), (("--split-conditioning",), ["build rtx:sm89 conditioning"])):
        names = [stage["name"] for stage in run(*arguments, *more).json["stages"]]
        assert names == ["graph", "weights", "build rtx:sm89 (1 segment)", *conditioning]
