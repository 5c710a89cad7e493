"""Exports that are killed, interrupted or run at the same time, in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.bundle import staged_bundle, staging
from mmdit_deploy.errors import BundleError

Start = Callable[[Path], Any]


def _export(final: Path) -> None:
    with staged_bundle(final, force=False) as directory:
        (directory / "model.onnx").write_bytes(b"ours")


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path: Path, exporter: Start) -> None:
    final = tmp_path / "mini"
    child = exporter(final)
    assert child.signal(signal.SIGKILL) == -signal.SIGKILL
    assert (child.directory / "weights.safetensors").read_bytes() == b"half"
    assert not final.exists()
    _export(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other"]


def test_a_removal_that_was_cut_short_is_resumed(tmp_path: Path, exporter: Start) -> None:
    child = exporter(tmp_path / "mini")
    child.signal(signal.SIGKILL)
    (child.directory / "weights.safetensors").unlink()
    child.directory.rmdir()
    assert os.listdir(child.directory.parent) == ["lock"]
    assert staging.clear_abandoned(tmp_path) == 1
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path, exporter: Start) -> None:
    child = exporter(tmp_path / "mini")
    assert child.signal(signal.SIGINT) == 130
    assert os.listdir(tmp_path) == []


def test_a_live_run_is_left_alone_and_loses_to_who_was_first(tmp_path: Path, exporter: Start) -> None:
    final = tmp_path / "mini"
    child = exporter(final)
    _export(final)
    assert child.directory.is_dir()
    status, errors = child.finish()
    assert status == BundleError.exit_status
    assert "when the export was done" in errors
    assert (final / "model.onnx").read_bytes() == b"ours"
    assert os.listdir(final) == ["model.onnx"]
    assert os.listdir(tmp_path) == ["mini"]


def test_a_dead_run_is_cleared_beside_a_live_one(tmp_path: Path, exporter: Start) -> None:
    dead, live = exporter(tmp_path / "mini"), exporter(tmp_path / "mini")
    dead.signal(signal.SIGKILL)
    _export(tmp_path / "other")
    assert not dead.directory.parent.exists()
    assert live.finish() == (0, "")
    assert (tmp_path / "mini" / "model.onnx").read_bytes() == b"child"
    assert sorted(os.listdir(tmp_path)) == ["mini", "other"]


def test_only_our_own_leftovers_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".partial-empty").mkdir()  # a run killed at its first step
    somebody = tmp_path / ".partial-download"
    somebody.mkdir()
    (somebody / "data").write_text("mine")
    (tmp_path / ".partial-file").write_text("mine")
    target = tmp_path / "target"
    target.mkdir()
    (target / "lock").touch()
    (tmp_path / ".partial-link").symlink_to(target)
    assert staging.clear_abandoned(tmp_path) == 1
    kept = [".partial-download", ".partial-file", ".partial-link", "target"]
    assert sorted(os.listdir(tmp_path)) == kept
    assert os.listdir(target) == ["lock"]


def test_a_new_staging_directory_taken_for_an_abandoned_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_new = staging._lock_new
    calls: list[Path] = []

    def slow(container: Path) -> int | None:
        calls.append(container)
        if len(calls) == 1:
            assert staging.clear_abandoned(tmp_path) == 1
        return lock_new(container)

    monkeypatch.setattr(staging, "_lock_new", slow)
    _export(tmp_path / "mini")
    assert len(calls) == 2
    assert os.listdir(tmp_path) == ["mini"]


def test_a_lock_taken_between_opening_and_locking_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = staging.fcntl.flock
    calls = 0

    def late(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the new run's lock exists, and another run clears it first
            assert staging.clear_abandoned(tmp_path) == 1
        flock(descriptor, operation)

    monkeypatch.setattr(staging.fcntl, "flock", late)
    _export(tmp_path / "mini")
    assert calls == 3
    assert os.listdir(tmp_path) == ["mini"]
