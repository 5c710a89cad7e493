from __future__ import annotations

import html as html_escapes
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmdit_deploy.report import verdict_html, write_html
from mmdit_deploy.verify.records import Verdict

MakeVerdict = Callable[..., Verdict]

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags balance, and keeps the tags, attributes and visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(*verdicts: Verdict, **facts: str) -> Page:
    return Page(verdict_html(verdicts, title="Parity", facts=facts))


def test_the_page_needs_nothing_from_outside(make_verdict: MakeVerdict) -> None:
    source = verdict_html([make_verdict()], title="Parity", facts={})

    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", source)
    assert not any(name in ("src", "srcset") for name, _ in Page(source).attributes)
    assert all((value or "").startswith("#") for name, value in Page(source).attributes if name == "href")


def test_a_failure_is_on_top_and_names_the_block(make_verdict: MakeVerdict) -> None:
    shown = page(make_verdict(), make_verdict(target="ort-cuda", rel_l2={"blocks.2": 0.1}), seed="7")

    assert shown.text.index("FAIL") < shown.text.index("1 within tolerance, 1 out of tolerance")
    callout = shown.text[shown.text.index("First out of tolerance") :]
    assert callout.index("blocks.2") < callout.index("rel-L2 1.00e-01 > 0.005") < callout.index("t=1000")
    assert "seed 7" in shown.text


def test_a_pass_says_weights_tolerance_and_what_was_left_out(make_verdict: MakeVerdict) -> None:
    shown = page(make_verdict(not_executed=("rtx:sm89 is built, not executed: no GPU here",)))

    for words in ("PASS", "random (seed 0)", "eleven significant bits", "built, not executed: no GPU here"):
        assert words in shown.text
    assert "First out of tolerance" not in shown.text


def test_the_heading_says_what_passed_and_what_was_not_executed(make_verdict: MakeVerdict) -> None:
    built = replace(make_verdict(target="rtx:sm89"), engine_executed=False)
    source = verdict_html([make_verdict(), built], title="Parity", facts={})

    words = "PASS on ort-cpu · rtx:sm89 built, not executed"
    assert f"<title>{words}: Parity</title>" in source
    assert f'<span class="badge not-executed">{words}</span>' in source
    assert ".not-executed" in source[source.index("<style>") : source.index("</style>")]


@pytest.mark.parametrize(
    ("targets", "heading"),
    [
        ({"ort-cpu": "pass", "ort-cuda": "pass"}, "PASS"),
        ({"rtx:sm89": "built"}, "NOT EXECUTED"),
        ({"ort-cpu": "fail", "ort-cuda": "fail"}, "FAIL"),
        (
            {"ort-cpu": "pass", "ort-cuda": "fail", "trt": "built", "rtx:sm89": "built", "rtx:sm86": "none"},
            "FAIL on ort-cuda · PASS on ort-cpu · trt, rtx:sm89 built, not executed · rtx:sm86 not verified",
        ),
        ({"ort-cpu": "pass", "ort-cuda": "none"}, "PASS on ort-cpu · ort-cuda not verified"),
    ],
)
def test_headings(make_verdict: MakeVerdict, targets: dict[str, str], heading: str) -> None:
    made = {
        "pass": lambda target: make_verdict(target=target),
        "fail": lambda target: make_verdict(target=target, rel_l2={"blocks.2": 0.1}),
        "built": lambda target: replace(make_verdict(target=target), engine_executed=False),
        "none": lambda target: make_verdict(target=target, executed=()),
    }
    verdicts = [made[kind](target) for target, kind in targets.items()]
    assert f"<title>{heading}: Parity</title>" in verdict_html(verdicts, title="Parity", facts={})


def test_the_machine_is_on_the_page_where_it_is_known(make_verdict: MakeVerdict) -> None:
    machine = {
        "cpu": "A CPU",
        "cores": 16,
        "gpu": "NVIDIA L40S",
        "driver": "580.95.05",
        "cuda": "13.0",
        "torch": "2.13.0",
    }
    shown = page(replace(make_verdict(), machine=machine))

    assert "machine A CPU, 16 cores; NVIDIA L40S, driver 580.95.05, CUDA 13.0; torch 2.13.0" in shown.text
    assert "machine" not in page(make_verdict()).text


def test_hostile_text_is_shown_not_run(make_verdict: MakeVerdict) -> None:
    hostile = "</style></svg><script>alert('x')</script>&\"\x00\ud800"
    verdict = make_verdict(
        names=(hostile,),
        rel_l2={hostile: 0.1},
        target=hostile,
        weights=hostile,
        executed=(hostile,),
        not_executed=(hostile,),
    )
    verdict = replace(verdict, machine={"cpu": hostile, hostile: hostile})
    source = verdict_html([verdict, verdict], title=hostile, facts={hostile: hostile})

    shown = Page(source)
    assert "script" not in shown.tags
    assert "<script>alert('x')</script>&\"" in shown.text
    source.encode("utf-8")


def test_nothing_executed_is_not_a_pass(make_verdict: MakeVerdict) -> None:
    shown = page(make_verdict(executed=(), not_executed=("rtx:sm89 is built, not executed: no GPU here",)))

    assert "NOT VERIFIED" in shown.text and "PASS" not in shown.text
    assert "svg" not in shown.tags
    assert "NOT VERIFIED" in page().text


def test_every_block_is_in_the_table_of_figures(make_verdict: MakeVerdict) -> None:
    source = verdict_html([make_verdict(20)], title="Parity", facts={})
    table = source[source.index("Every block") : source.index("Every output")]

    rows = [html_escapes.unescape(name) for name in re.findall(r'<th scope="row">(.*?)</th>', table)]
    assert rows == [f"blocks.{i}" for i in range(20)]


def test_nonfinite_figures_are_shown(make_verdict: MakeVerdict) -> None:
    shown = page(make_verdict(rel_l2={"blocks.2": math.nan, "sample": math.inf}))

    assert "3 values are NaN or Inf" in shown.text
    assert "3 NaN or Inf (out)" in shown.text
    assert "rel-L2 inf > 0.005" in shown.text


def test_the_file_holds_the_page(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html([make_verdict()], path, title="Parity", facts={"spec": "4 blocks"})

    assert path.read_text("utf-8") == verdict_html([make_verdict()], title="Parity", facts={"spec": "4 blocks"})
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
