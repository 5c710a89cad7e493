from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mmdit_deploy.report import verdict_text
from mmdit_deploy.verify.records import Verdict

MakeVerdict = Callable[..., Verdict]


def test_a_pass_says_what_was_verified_how_well_and_with_which_weights(make_verdict: MakeVerdict) -> None:
    lines = verdict_text(make_verdict(rel_l2={("local", "blocks.2"): 2.5e-3})).splitlines()

    assert lines[0].startswith("PASS")
    assert all(words in lines[0] for words in ("sd3-tiny-fp16", "ort-cpu", "fp16", "12.5 s"))
    text = "\n".join(lines)
    assert "random (seed 0)" in text
    assert "rel-L2 ≤ 0.005" in text and "cosine ≥ 0.9999" in text and "eleven significant bits" in text
    local = next(line for line in lines if line.strip().startswith("local"))
    assert "2.50e-03" in local and "blocks.2" in local and "t=1000" in local
    assert "bf16 is emulated on this CPU" in text
    assert "first out of tolerance" not in text


def test_a_failure_names_the_first_block_in_the_models_order_not_the_worst(make_verdict: MakeVerdict) -> None:
    lines = verdict_text(make_verdict(12, rel_l2={"blocks.3": 6e-3, "blocks.7": 0.9})).splitlines()

    assert lines[0].startswith("FAIL")
    first = lines.index("first out of tolerance:")
    assert "local blocks.3 " in lines[first + 1]
    assert "rel-L2 6.00e-03 > 0.005" in lines[first + 2]
    assert "cosine" not in lines[first + 2]  # it kept that bound
    assert any("local blocks.7" in line for line in lines[first + 3 :])


def test_many_blocks_and_failures_still_fit_a_screen(make_verdict: MakeVerdict) -> None:
    everything_out = {f"blocks.{i}": 0.1 for i in range(128)}
    text = verdict_text(make_verdict(128, rel_l2=everything_out, not_executed=("rtx:sm89: no GPU here",)))

    assert len(text.splitlines()) <= 32
    assert "and 124 more" in text


def test_nonfinite_values_are_counted_and_called_so(make_verdict: MakeVerdict) -> None:
    text = verdict_text(make_verdict(rel_l2={("cumulative", "blocks.1"): math.nan}))

    assert text.startswith("FAIL")
    assert "cumulative blocks.1" in text
    assert "3 values are NaN or Inf" in text


def test_what_was_not_executed_is_neither_passed_nor_failed(make_verdict: MakeVerdict) -> None:
    why = "rtx:sm89 is built, not executed: this machine has no GPU"
    text = verdict_text(make_verdict(executed=(), not_executed=(why,)))

    assert text.startswith("NOT VERIFIED")
    assert "1 item not executed" in text.splitlines()[0]
    assert "executed: nothing" in text and why in text


def test_a_pass_that_left_something_out_says_so_in_its_first_line(make_verdict: MakeVerdict) -> None:
    text = verdict_text(make_verdict(not_executed=("the largest shape: not enough memory",)))

    assert "1 item not executed" in text.splitlines()[0]
    assert "the largest shape: not enough memory" in text


def test_names_cannot_steer_the_terminal_or_forge_lines(make_verdict: MakeVerdict) -> None:
    verdict = make_verdict(weights="a\x1b[2J\nPASS everything", rel_l2={"x\rPASS": 0.1}, names=("x\rPASS",))
    text = verdict_text(verdict)

    assert not set("\x1b\r") & set(text)
    assert not any(line.startswith("PASS") for line in text.splitlines())


def test_a_tolerance_on_the_seventh_digit_is_not_rounded_away(make_verdict: MakeVerdict) -> None:
    verdict = replace(make_verdict(), tolerance={"min_cosine": 0.9999999, "max_rel_l2": 1e-5})

    assert "cosine ≥ 0.9999999" in verdict_text(verdict)
