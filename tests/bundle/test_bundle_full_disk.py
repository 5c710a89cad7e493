"""Disks that are full or cannot be written, for real: a tmpfs of 2 MB."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit_deploy.bundle import open_bundle, staged_bundle
from mmdit_deploy.errors import BundleError, MachineError

SMALL_DISK = "2m"


def test_a_full_disk_is_a_machine_error_and_leaves_nothing(small_disk: Path, fill: Callable[..., None]) -> None:
    final = small_disk / "mini"
    with pytest.raises(MachineError, match="No space left on device") as caught:
        with staged_bundle(final, force=False) as directory:
            with open(directory / "weights.safetensors", "wb", buffering=0) as file:
                for _ in range(100):
                    file.write(bytes(100_000))
    assert caught.value.exit_status == 3
    assert str(small_disk) in str(caught.value) and " bytes free" in str(caught.value)
    assert os.listdir(small_disk) == []
    with staged_bundle(final, force=False) as directory:  # and the space is free again
        fill(directory)
    open_bundle(final)


def test_a_full_disk_keeps_the_bundle_that_was_to_be_replaced(small_disk: Path, fill: Callable[..., None]) -> None:
    final = small_disk / "mini"
    with staged_bundle(final, force=False) as directory:
        fill(directory)
    with pytest.raises(MachineError), staged_bundle(final, force=True) as directory:
        (directory / "weights.safetensors").write_bytes(bytes(3_000_000))
    open_bundle(final)
    assert os.listdir(small_disk) == ["mini"]


def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", str(small_disk)], check=False)
    files = 0
    try:
        while files < 100_000:
            (small_disk / f"{files}").touch()
            files += 1
    except OSError as error:
        assert error.errno == errno.ENOSPC
    if files == 100_000:
        pytest.skip("this kernel does not limit a tmpfs's files")
    with pytest.raises(MachineError, match="room for the bundle"):
        with staged_bundle(small_disk / "mini", force=False):
            pytest.fail("the block must not run")
    assert not [name for name in os.listdir(small_disk) if name.startswith(".partial")]


def test_only_a_full_disk_is_translated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_bundle(tmp_path / "mini", force=False):
        open(tmp_path / "no such input")


def test_a_parent_that_cannot_be_written(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for final in (small_disk / "mini", small_disk / "new" / "mini"):
        with pytest.raises(MachineError, match="writable"), staged_bundle(final, force=False):
            pytest.fail("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    with pytest.raises(MachineError, match="writable"), staged_bundle(parent / "mini", force=False):
        pytest.fail("the block must not run")


def test_a_mount_point_is_refused_before_the_work(small_disk: Path) -> None:
    with pytest.raises(BundleError, match="a mount point"), staged_bundle(small_disk, force=True):
        pytest.fail("the block must not run")
