"""Exports that are interrupted or killed in the middle, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.bundle import open_bundle

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Where the bundle shall be."""
    path = tmp_path / "dist"
    path.mkdir()
    return path


@pytest.fixture
def begun(
    spawn: Callable[..., Any], checkpoint: Path, parent: Path, quick: tuple[str, ...]
) -> Iterator[subprocess.Popen[str]]:
    """An export that has begun to write and has seconds of tracing before it."""
    process = spawn("export", checkpoint, *quick, "-o", parent / "b")
    deadline = time.monotonic() + 60
    while not list(parent.glob(".partial-*/bundle")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(
    begun: subprocess.Popen[str], parent: Path, number: int, status: int
) -> None:
    begun.send_signal(number)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode == status
    assert err.endswith("interrupted\n") and "Traceback" not in err
    assert out == "" and os.listdir(parent) == []


def test_what_a_killed_export_left_is_cleared_by_the_next(
    begun: subprocess.Popen[str],
    run: Callable[..., Any],
    checkpoint: Path,
    parent: Path,
    quick: tuple[str, ...],
) -> None:
    begun.kill()
    begun.communicate(timeout=60)
    assert begun.returncode == -signal.SIGKILL
    (left,) = os.listdir(parent)
    assert left.startswith(".partial-")  # there is no bundle, nor half of one under its name
    result = run("export", checkpoint, *quick, "-o", parent / "b")
    assert result.status == 0, result.err
    assert os.listdir(parent) == ["b"]
    open_bundle(parent / "b")


def test_an_interrupted_replacement_keeps_the_old_bundle(
    spawn: Callable[..., Any], checkpoint: Path, bundle: Path, quick: tuple[str, ...]
) -> None:
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    process = spawn("export", checkpoint, *quick, "-o", bundle, "--force")
    while not list(bundle.parent.glob(".partial-*/bundle")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    assert not list(bundle.parent.glob(".partial-*"))
