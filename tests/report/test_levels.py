"""Noise floor, trajectory, image and the tolerances of each are in every report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mmdit_deploy.report import verdict_html, verdict_text, write_junit
from mmdit_deploy.report.plots import trajectory_plot
from mmdit_deploy.report.words import times
from mmdit_deploy.verify.records import Case, Check, Errors, NoiseFloor, Trajectory, TrajectoryStep, Verdict

MakeVerdict = Callable[..., Verdict]
FLOOR = NoiseFloor("eager in float16", 3, {"blocks.0": 3e-4}, 2e-4, 1.5)
CASE = Case(1, 16, 16, 77, 1000.0)
TOLERANCES = {
    "trajectory": {"min_cosine": 0.999, "max_rel_l2": 0.02, "reason": "steps add up"},
    "image": {"min_psnr": 40.0, "min_ssim": 0.98, "reason": "nobody sees it"},
    "fp16": {"min_cosine": 0.9999, "max_rel_l2": 5e-3, "reason": "eleven bits"},
}


@pytest.fixture
def full(make_verdict: MakeVerdict) -> Callable[..., Verdict]:
    """A verdict with everything: the latent ends `last` off, the image has a PSNR of `psnr`."""

    def make(*, last: float = 0.01, psnr: float = 45.0, floor: NoiseFloor = FLOOR) -> Verdict:
        verdict = make_verdict()
        steps = [TrajectoryStep(1000.0 - 100 * i, Errors(0.9999, last * (i + 1) / 4, 0.1), 1e-3) for i in range(4)]
        ends = Errors(0.9999, last, 0.1)
        image = Errors(0.9999, 0.01, 0.1, psnr=psnr, ssim=0.99)
        checks = [replace(c, floor=2e-4) for c in verdict.checks]
        checks.append(Check("final latent", "trajectory", CASE, ends, True, last <= 0.02, "trajectory", 1e-3))
        checks.append(Check("decoded image", "image", CASE, image, True, psnr >= 40, "image"))
        checks.append(Check("conditioning", "local", CASE, ends, True, True, "fp16"))
        return replace(
            verdict,
            checks=tuple(checks),
            tolerances=TOLERANCES,
            tolerance_source="ours.toml",
            noise_floors=(floor,),
            trajectories=(Trajectory("latent", CASE, "Euler, 4 steps, shift 3", "the whole engine", tuple(steps)),),
        )

    return make


def test_the_terminal_says_how_many_times_the_noise_floor(full: Callable[..., Verdict]) -> None:
    text = verdict_text(full())
    assert "floor      eager in float16: rel-L2 2.00e-04 at the output, worst of 3 cases" in text
    assert "the engine's error is at most 2 × that" in " ".join(text.split())
    table = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ") and line.strip()}
    assert "2 ×" in table["engine"] and "10 ×" in table["trajectory"] and "decoded" in table["image"]
    assert "decoded image: PSNR 45.0 dB, SSIM 0.9900" in text


def test_without_a_floor_there_is_no_column_for_it(make_verdict: MakeVerdict) -> None:
    text = verdict_text(make_verdict())
    assert "floor" not in text and "×" in text  # the grids'


def test_each_tolerance_that_binds_something_is_told(full: Callable[..., Verdict]) -> None:
    text = " ".join(verdict_text(full()).split())
    assert "tolerance the last latent: rel-L2 ≤ 0.02, cosine ≥ 0.999 (steps add up)" in text
    assert "tolerance the image: PSNR ≥ 40, SSIM ≥ 0.98 (nobody sees it)" in text
    assert "tolerance calls in fp16: rel-L2 ≤ 0.005" in text
    page = verdict_html([full()], title="t", facts={})
    assert "tolerance of the image" in page and "ours.toml" in page and "nobody sees it" in page


def test_an_image_out_of_tolerance_says_by_which_bound(full: Callable[..., Verdict], tmp_path: Path) -> None:
    verdict = full(psnr=31.25)
    assert "image decoded image" in verdict_text(verdict) and "PSNR 31.2 dB < 40" in verdict_text(verdict)
    assert "PSNR 31.2 dB &lt; 40" in verdict_html([verdict], title="t", facts={})
    write_junit([verdict], tmp_path / "junit.xml")
    (failure,) = ET.parse(tmp_path / "junit.xml").iterfind(".//failure")
    assert "PSNR 31.2 dB < 40" in str(failure.get("message"))


def test_junit_carries_floor_tolerances_and_multiples(full: Callable[..., Verdict], tmp_path: Path) -> None:
    write_junit([full()], tmp_path / "junit.xml")
    tree = ET.parse(tmp_path / "junit.xml")
    properties = {p.get("name"): p.get("value") for p in tree.iter("property")}
    assert "at most 2 × that" in str(properties["noise_floor.0"])
    assert properties["tolerance.source"] == "ours.toml" and properties["tolerance.image.min_psnr"] == "40.0"
    names = {(case.get("classname") or "").rsplit(".", 1)[-1] for case in tree.iter("testcase")}
    assert {"trajectory", "image"} <= names
    said = [out.text or "" for out in tree.iter("system-out")]
    assert any("at most 10 × the noise floor" in text for text in said)


def test_the_page_plots_the_error_over_the_steps(full: Callable[..., Verdict]) -> None:
    verdict = full()
    svg = ET.fromstring(trajectory_plot(verdict, verdict.trajectories[0]))
    titles = [t.text or "" for t in svg.iter("title")]
    assert sum(t.startswith("step ") for t in titles) == 4
    assert sum(t.startswith("noise floor of step") for t in titles) == 4
    assert any("tolerance of the last 0.02" in (t.text or "") for t in svg.iter("text"))
    heights = [float(c.get("cy", "nan")) for c in svg.iter("circle") if c.find("title") is not None]
    assert heights == sorted(heights, reverse=True)  # it grows
    assert trajectory_plot(verdict, verdict.trajectories[0]) in verdict_html([verdict], title="t", facts={})


def test_a_last_step_out_of_tolerance_or_not_finite_is_red(full: Callable[..., Verdict]) -> None:
    def red(verdict: Verdict) -> list[str]:
        svg = ET.fromstring(trajectory_plot(verdict, verdict.trajectories[0]))
        bad = [e for e in svg.iter() if "bad" in (e.get("class") or "").split() and e.find("title") is not None]
        return [e.findtext("title") or "" for e in bad]

    assert red(full()) == []
    (last,) = red(full(last=0.03))
    assert last.startswith("step 4")
    verdict = full()
    (record,) = verdict.trajectories
    broken = replace(record.steps[1], errors=Errors(math.nan, math.nan, math.nan, 7))
    steps = (record.steps[0], broken, *record.steps[2:])
    (second,) = red(replace(verdict, trajectories=(replace(record, steps=steps),)))
    assert second == "step 2, t=900: 7 values are NaN or Inf"


def test_blocks_are_plotted_above_their_floor(full: Callable[..., Verdict]) -> None:
    page = verdict_html([full()], title="t", facts={})
    assert page.count("noise floor of blocks.0") == 3  # a bar a case
    assert "series-floor" in page


def test_a_floor_that_overflowed_is_called_so(full: Callable[..., Verdict]) -> None:
    text = verdict_text(full(floor=replace(FLOOR, output=math.nan)))
    assert "eager in float16: NaN or Inf at the output" in text


@pytest.mark.parametrize(
    ("multiple", "words"),
    [(None, "–"), (0.83, "0.83 ×"), (1.0, "1 ×"), (31.58, "32 ×"), (1234.5, "1234 ×"), (math.inf, "inf")],
)
def test_multiples_in_words(multiple: float | None, words: str) -> None:
    assert times(multiple) == words
