from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from xml.etree import ElementTree as ET

import pytest

from mmdit_deploy.report.plots import block_plot, output_plot
from mmdit_deploy.verify.records import Verdict

MakeVerdict = Callable[..., Verdict]


def dots(svg: ET.Element) -> list[ET.Element]:
    """What shows a figure: every marker that says one when hovered over."""
    return [element for element in svg.iter() if element is not svg and element.find("title") is not None]


def hover(dot: ET.Element) -> str:
    return dot.findtext("title") or ""


def words(svg: ET.Element) -> list[str]:
    return [text.text or "" for text in svg.iter("text")]


def numbers(element: ET.Element) -> list[float]:
    return [float(value) for value in element.get("points", "").replace(",", " ").split()]


def test_each_case_has_a_dot_and_the_line_goes_through_the_worst(make_verdict: MakeVerdict) -> None:
    svg = ET.fromstring(block_plot(make_verdict(6)))

    assert len(dots(svg)) == 6 * 2 * 3
    assert [len(numbers(line)) for line in svg.iter("polyline")] == [12, 12]
    assert "tolerance 0.005" in words(svg)
    assert svg.findtext("title") == "rel-L2 by block, ort-cpu"


def test_a_worse_block_is_drawn_higher(make_verdict: MakeVerdict) -> None:
    svg = ET.fromstring(block_plot(make_verdict(3, rel_l2={"blocks.1": 0.1})))

    # Of each block's cases, all equal, the last local one stands for it; cumulative errors are no circles.
    heights = {hover(dot).split()[0]: float(dot.attrib["cy"]) for dot in dots(svg) if dot.tag == "circle"}
    assert heights["blocks.1"] < heights["blocks.0"] == heights["blocks.2"]
    assert "first out: blocks.1" in words(svg)


def test_a_block_is_marked_that_fails_only_inside(make_verdict: MakeVerdict) -> None:
    verdict = make_verdict(3)
    inside = dataclasses.replace(verdict.checks[0], name="blocks.1", level="nodes", passed=False)
    svg = ET.fromstring(block_plot(dataclasses.replace(verdict, checks=(*verdict.checks, inside))))
    assert "first out: blocks.1" in words(svg)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_block_is_marked_and_breaks_the_line(make_verdict: MakeVerdict, value: float) -> None:
    svg = ET.fromstring(block_plot(make_verdict(7, rel_l2={("local", "blocks.3"): value})))

    assert "NaN, Inf" in words(svg)
    local = [dot for dot in dots(svg) if "blocks.3 local" in hover(dot)]
    assert len(local) == 3 and all("cross" in dot.attrib["class"] for dot in local)
    assert sorted(len(numbers(line)) // 2 for line in svg.iter("polyline")) == [3, 3, 7]


def test_only_nonfinite_or_only_exact_values_still_make_a_plot(make_verdict: MakeVerdict) -> None:
    for value, strip in ((math.nan, "NaN, Inf"), (0.0, "exact 0")):
        everything = {(level, "blocks.0"): value for level in ("local", "cumulative")}
        svg = ET.fromstring(block_plot(make_verdict(1, rel_l2=everything)))
        assert strip in words(svg)
        assert not list(svg.iter("polyline"))


def test_hostile_names_stay_text(make_verdict: MakeVerdict) -> None:
    name = "<script>&\"'\x00"
    svg = ET.fromstring(block_plot(make_verdict(names=(name, "b"), rel_l2={name: 0.1})))

    assert not list(svg.iter("script"))
    assert any("<script>&\"'" in text for text in words(svg))


def test_labels_of_many_blocks_thin_out(make_verdict: MakeVerdict) -> None:
    svg = ET.fromstring(block_plot(make_verdict(128)))

    labels = [int(text) for text in words(svg) if text.isdigit()]
    assert labels == list(range(0, 128, labels[1])) and len(labels) < 40


def test_outputs_are_joined_over_timesteps_of_one_shape(make_verdict: MakeVerdict) -> None:
    svg = ET.fromstring(output_plot(make_verdict()))

    assert len(dots(svg)) == 2 * 3
    assert [len(numbers(line)) // 2 for line in svg.iter("polyline")] == [2, 2]
    assert {"t=20", "t=500", "t=1000"} <= set(words(svg))


def test_nothing_checked_makes_no_plot(make_verdict: MakeVerdict) -> None:
    verdict = make_verdict(executed=())

    assert block_plot(verdict) == output_plot(verdict) == ""
