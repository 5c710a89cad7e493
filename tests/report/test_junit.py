from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mmdit_deploy.report import write_junit
from mmdit_deploy.verify.records import Verdict

MakeVerdict = Callable[..., Verdict]


def written(verdicts: Sequence[Verdict], folder: Path) -> ET.Element:
    write_junit(verdicts, folder / "junit.xml")
    return ET.parse(folder / "junit.xml").getroot()


def test_counts_are_those_of_the_testcases(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    good = make_verdict(4, not_executed=("the largest shape: not enough memory",))
    bad = make_verdict(4, target="ort-cuda", rel_l2={"blocks.1": 0.1, "sample": math.nan})
    root = written([good, bad], tmp_path)

    # Four blocks at two levels, and the output at two: cases are aggregated.
    assert [(s.get("tests"), s.get("failures"), s.get("skipped")) for s in root] == [
        ("11", "0", "1"),
        ("10", "3", "0"),
    ]
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("21", "3", "1")
    for suite in root:
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        assert float(suite.attrib["time"]) == 12.5


def test_a_failure_says_the_bound_and_all_failing_cases(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    root = written([make_verdict(rel_l2={"blocks.1": 0.1})], tmp_path)

    (testcase,) = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert (testcase.get("name"), testcase.get("classname")) == ("blocks.1", "sd3-tiny-fp16.ort-cpu.local")
    (failure,) = testcase.iter("failure")
    assert "rel-L2 1.00e-01 > 0.005" in failure.attrib["message"]
    assert len((failure.text or "").splitlines()) == 3


def test_one_bad_case_among_good_ones_fails_the_testcase(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    verdict = make_verdict(1)
    checks = list(verdict.checks)
    checks[1] = replace(checks[1], errors=replace(checks[1].errors, rel_l2=0.2), passed=False)
    root = written([replace(verdict, checks=tuple(checks))], tmp_path)

    (failure,) = root.iter("failure")
    assert "2.00e-01" in failure.attrib["message"] and "1 of 3 cases" in failure.attrib["message"]


def test_what_was_not_executed_is_skipped_with_the_reason(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    why = "rtx:sm89 is built, not executed: this machine has no GPU"
    root = written([make_verdict(executed=(), not_executed=(why,))], tmp_path)

    messages = [skipped.attrib["message"] for skipped in root.iter("skipped")]
    assert why in messages
    assert any("nothing was verified" in message for message in messages)
    assert root.get("tests") == root.get("skipped") == "2"


def test_properties_carry_tolerance_weights_and_reference(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    root = written([make_verdict()], tmp_path)

    properties = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert properties["weights"] == "random (seed 0)"
    assert properties["reference"] == "the eager fp32 model"
    assert properties["tolerance.max_rel_l2"] == "0.005"


def test_properties_carry_the_machine_where_the_engine_ran(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    machine = {"cpu": "A CPU", "gpu": None, "driver": "580.95.05"}
    for verdict, expected in (
        (replace(make_verdict(), machine=machine), {"cpu": "A CPU", "gpu": "none", "driver": "580.95.05"}),
        (make_verdict(), {}),
    ):
        properties = {p.attrib["name"]: p.get("value") for p in written([verdict], tmp_path).iter("property")}
        found = {name.removeprefix("machine."): v for name, v in properties.items() if name.startswith("machine.")}
        assert found == expected


def test_hostile_names_leave_the_file_well_formed(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    name = "<b>&\"'\x00\ud800\ufffe]]>"
    root = written([make_verdict(names=(name,), rel_l2={name: 0.1}, weights=name)], tmp_path)

    assert any(case.attrib["name"].startswith("<b>&\"'") for case in root.iter("testcase"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    make_verdict: MakeVerdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("old")

    def no_space(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        write_junit([make_verdict()], path)
    assert [p.name for p in tmp_path.iterdir()] == ["junit.xml"]
    assert path.read_text() == "old"


def test_missing_folders_are_made(make_verdict: MakeVerdict, tmp_path: Path) -> None:
    write_junit([make_verdict()], tmp_path / "reports" / "today" / "junit.xml")

    assert (tmp_path / "reports" / "today" / "junit.xml").exists()
