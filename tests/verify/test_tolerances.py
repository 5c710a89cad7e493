"""Tolerances are data: ours for every precision and level, and a user's own in their place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import SCHEMES, LinearPlan, PrecisionPlan
from mmdit_deploy.spec import PRECISIONS, QUANTIZED, precision
from mmdit_deploy.verify import TOLERANCES, Errors, load_tolerances, within
from mmdit_deploy.verify.bounds import Bounds
from mmdit_deploy.verify.tolerances import DEFAULTS, bounds_of

STRICTER = """
[step.fp16]
max_rel_l2 = 1e-6

[image.fp16]
min_psnr = 60
max_lpips = 0.01
reason = "our customers zoom in"
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("level", ["step", "trajectory", "image"])
def test_every_precision_has_bounds_and_a_reason_at_every_level(level: str) -> None:
    table = getattr(DEFAULTS, level)
    assert list(table) == [*PRECISIONS, *QUANTIZED]
    assert all(bounds_of(t) and len(t.reason) > 20 for t in table.values())


def test_bounds_never_tighten_as_bits_get_fewer() -> None:
    for table in (DEFAULTS.step, DEFAULTS.trajectory):
        found = [table[name] for name in ("fp32", "fp16", "bf16", "fp8", "fp4")]
        assert [t.max_rel_l2 for t in found] == sorted(t.max_rel_l2 for t in found)
        assert [t.min_cosine for t in found] == sorted((t.min_cosine for t in found), reverse=True)
    images = [DEFAULTS.image[name] for name in ("fp32", "fp16", "bf16", "fp8", "fp4")]
    assert [t.min_psnr for t in images] == sorted((t.min_psnr for t in images), reverse=True)


def test_a_users_file_changes_what_it_names_and_nothing_else(write: Callable[[str], Path]) -> None:
    path = write(STRICTER)
    mine = load_tolerances(path)
    assert mine.step["fp16"] == dataclasses.replace(TOLERANCES["fp16"], max_rel_l2=1e-6, reason=f"as {path} says")
    assert mine.image["fp16"].min_ssim == DEFAULTS.image["fp16"].min_ssim
    assert (mine.image["fp16"].min_psnr, mine.image["fp16"].reason) == (60.0, "our customers zoom in")
    assert {**mine.step, "fp16": None} == {**TOLERANCES, "fp16": None}
    assert mine.trajectory == DEFAULTS.trajectory
    assert mine.source == str(path) and "mmdit-deploy" in DEFAULTS.source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[step.fp16", "mine.toml"),
        ("[stop.fp16]\nmin_cosine = 0.9", "stop"),
        ("[step.fp12]\nmin_cosine = 0.9", "fp12"),
        ("[step.fp16]\nmin_cosin = 0.9", "min_cosin"),
        ("[step.fp16]\nmin_psnr = 40", "min_psnr"),  # a bound of images
        ("[step.fp16]\nmin_cosine = 1.5", "min_cosine = 1.5"),
        ("[step.fp16]\nmax_rel_l2 = -0.1", "max_rel_l2 = -0.1"),
        ("[step.fp16]\nmax_rel_l2 = nan", "max_rel_l2 = nan"),
        ("[step.fp16]\nmax_rel_l2 = true", "max_rel_l2 = True"),
        ('[step.fp16]\nmax_rel_l2 = "0.1"', "max_rel_l2 = '0.1'"),
        ("[step.fp16]\nreason = 3", "reason = 3"),
        ("[step]\nfp16 = 0.1", "fp16 = 0.1"),
        ("step = 1", "step = 1"),
    ],
)
def test_a_file_that_says_something_else_is_refused(write: Callable[[str], Path], text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_tolerances(write(text))
    assert says in str(caught.value) and caught.value.fix


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "binary"):
        with pytest.raises(UsageError, match="takes a TOML file"):
            load_tolerances(path)


def test_an_engine_is_judged_by_the_users_file_and_the_verdict_names_it(
    write: Callable[[str], Path], copy_of: Callable[[str], Any]
) -> None:
    copy = copy_of("fp16")
    assert copy.verify().passed
    path = write(STRICTER)
    verdict = copy.verify(tolerances=load_tolerances(path))
    assert not verdict.passed
    assert verdict.tolerance["max_rel_l2"] == 1e-6
    assert verdict.tolerance_source == str(path) == verdict.to_json()["tolerance_source"]


def test_in_a_quantized_model_only_quantized_calls_may_err_as_such() -> None:
    fp8 = precision("fp8", "bf16")
    linear = LinearPlan(SCHEMES["fp8"], 1.0)
    planned = Bounds(fp8, PrecisionPlan(fp8, {"blocks.0.img.mlp.up": linear, "modulations.1.img.proj": linear}))
    for path in ("blocks.0", "modulations.1.img"):
        assert planned.of_call(path) == (TOLERANCES["fp8"], None)
    for path in ("conditioning", "blocks.1", "modulations.1.txt", "final"):
        assert planned.of_call(path) == (TOLERANCES["bf16"], "bf16")
    assert planned.named["bf16"]["max_rel_l2"] == TOLERANCES["bf16"].max_rel_l2
    assert Bounds(fp8).of_call("conditioning") == (TOLERANCES["fp8"], None)
    assert Bounds(precision("fp16")).of_call("blocks.0") == (TOLERANCES["fp16"], None)


def test_images_have_bounds_of_their_own() -> None:
    bound = dataclasses.replace(DEFAULTS.image["fp16"], min_psnr=40.0, min_ssim=0.9, max_lpips=None)
    good = Errors(1.0, 0.0, 0.0, psnr=40.0, ssim=0.9)
    assert within(good, bound)
    assert within(dataclasses.replace(good, psnr=math.inf), bound)
    for change in ({"psnr": 39.9}, {"ssim": 0.89}, {"psnr": math.nan}, {"psnr": None}, {"nonfinite": 1}):
        assert not within(dataclasses.replace(good, **change), bound)
    # what has a bound must have been measured
    assert not within(good, dataclasses.replace(bound, max_lpips=0.1))
    assert within(dataclasses.replace(good, lpips=0.1), dataclasses.replace(bound, max_lpips=0.1))
