"""One engine serves several threads, and ThreadSanitizer finds no race in what is ours."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def run_threads(build: Path, bundle: Path, calls: int, *further: str) -> subprocess.CompletedProcess[str]:
    """Four threads share an engine, each with shapes of its own, while another opens and closes engines."""
    suppressions = Path(__file__).with_name("threads.supp")
    # Where ONNX Runtime's locks are not seen, its unlocking of them is taken for a defect. Ours are lock_guards.
    options = f"suppressions={suppressions} report_mutex_bugs=0 halt_on_error=1 exitcode=66"
    return subprocess.run(
        [build / "tests/threads", bundle, "4", str(calls), *further],
        env={**os.environ, "TSAN_OPTIONS": options},
        capture_output=True,
        text=True,
        check=False,
    )


def test_threads_share_an_engine(sanitized: Path, bundle_of: Callable[..., Path]) -> None:
    done = run_threads(sanitized, bundle_of(split=True), 12)
    assert (done.returncode, done.stdout) == (0, "48 calls, 0 mismatches\n"), done.stderr[-4000:]


@pytest.mark.soak
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_four_threads_have_no_race(built: Callable[[str], Path], bundle_of: Callable[..., Path], split: bool) -> None:
    done = run_threads(built("threads"), bundle_of(split=split), 250)
    assert (done.returncode, done.stdout) == (0, "1000 calls, 0 mismatches\n"), done.stderr[-4000:]


@pytest.mark.soak
def test_a_race_would_be_found(built: Callable[[str], Path], bundle_of: Callable[..., Path]) -> None:
    done = run_threads(built("threads"), bundle_of(), 50, "race")
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr
