"""JUnit XML, in the common subset that GitLab, GitHub and Jenkins read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from mmdit_deploy.atomic import write_whole
from mmdit_deploy.report.summary import by_name, counted, floor_words, most_times_floor, outcome, worst
from mmdit_deploy.report.words import breaches, errors_words, printable, times
from mmdit_deploy.verify.records import Check, Verdict

COUNTS = ("tests", "failures", "errors", "skipped")


def write_junit(verdicts: Sequence[Verdict], path: str | os.PathLike[str]) -> None:
    """Write one testsuite per engine, one testcase per level and name, its worst case standing for all.

    What was not executed is a skipped testcase. Testcases carry no time: only the engine as a whole is timed.

    Args:
        verdicts: one per engine.
        path: the file; it appears whole or not at all, and missing folders are made.

    Raises:
        OSError: the file cannot be written.
    """
    root = ET.Element("testsuites", name="mmdit-verify")
    suites = [_suite(verdict) for verdict in verdicts]
    for count in COUNTS:
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.set("time", f"{sum(v.seconds for v in verdicts):.3f}")
    root.extend(suites)
    ET.indent(root)
    xml = ET.tostring(root, encoding="unicode")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}\n')


def _suite(verdict: Verdict) -> ET.Element:
    engine = printable(f"{verdict.bundle}.{verdict.target}")
    suite = ET.Element("testsuite", name=printable(f"{verdict.bundle} {verdict.target} {verdict.precision}"))
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(verdict):
        ET.SubElement(properties, "property", name=printable(name), value=printable(value))

    for (level, name), checks in by_name(verdict.checks).items():
        testcase = ET.SubElement(suite, "testcase", classname=f"{engine}.{level}", name=printable(name))
        _result(testcase, checks, verdict)
    skipped = list(verdict.not_executed)
    if outcome(verdict) == "NOT VERIFIED":
        # Without this, a suite that checked nothing would look as green as one that passed.
        skipped.append("nothing was verified: no check that the tolerance binds was run")
    for words in skipped:
        testcase = ET.SubElement(suite, "testcase", classname=f"{engine}.not_executed", name=printable(words))
        ET.SubElement(testcase, "skipped", message=printable(words))

    # An error, in JUnit's sense, is a test that broke before it could judge; verification raises then.
    paths = {"tests": "testcase", "failures": "*/failure", "errors": "*/error", "skipped": "*/skipped"}
    for count in COUNTS:
        suite.set(count, str(len(suite.findall(paths[count]))))
    suite.set("time", f"{verdict.seconds:.3f}")
    return suite


def _properties(verdict: Verdict) -> list[tuple[str, str]]:
    return [
        ("verdict", outcome(verdict)),
        ("bundle", verdict.bundle),
        ("target", verdict.target),
        ("precision", verdict.precision),
        ("weights", verdict.weights),
        ("reference", verdict.reference),
        *((f"tolerance.{key}", str(value)) for key, value in verdict.tolerance.items()),
        ("tolerance.source", verdict.tolerance_source),
        *(
            (f"tolerance.{name}.{key}", str(value))
            for name, bounds in verdict.tolerances.items()
            for key, value in bounds.items()
        ),
        *((f"noise_floor.{i}", words) for i, words in enumerate(floor_words(verdict))),
        *((f"machine.{key}", "none" if value is None else str(value)) for key, value in verdict.machine.items()),
        *((f"executed.{i}", words) for i, words in enumerate(verdict.executed)),
    ]


def _result(testcase: ET.Element, checks: Sequence[Check], verdict: Verdict) -> None:
    failed = [c for c in checks if not c.passed]
    if failed:
        of = f" ({len(failed)} of {counted(len(checks), 'case')})" if len(checks) > 1 else ""
        check = worst(failed)
        failure = ET.SubElement(
            testcase,
            "failure",
            type="nonfinite" if check.errors.nonfinite else "tolerance",
            message=f"{breaches(check, verdict.tolerance_of(check))} at {check.case}{of}",
        )
        failure.text = "\n".join(f"{c.case}: {errors_words(c.errors)}" for c in failed)
    check = worst(checks)
    out = ET.SubElement(testcase, "system-out")
    bound = "" if check.binding else "; the tolerance does not bind this"
    multiple = most_times_floor(checks)
    floor = "" if multiple is None else f"; at most {times(multiple)} the noise floor"
    out.text = f"worst of {len(checks)}: {errors_words(check.errors)} at {check.case}{bound}{floor}"
