"""How much memory may be taken: what psutil says, or less in a container."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mmdit_deploy.runtime import available_memory, memory

MACHINE = 1000


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mount of the control groups, with none that has a limit; memberships are in the file beside it."""
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    return tmp_path / "cgroup"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_without_control_groups_it_is_the_machines(groups: Path) -> None:
    assert available_memory() == MACHINE


@pytest.mark.parametrize(("limit", "room"), [(700, 500), ("max", MACHINE), (9000, MACHINE), (150, 0)])
def test_the_limit_of_a_container(groups: Path, limit: object, room: int) -> None:
    groups.with_name("membership").write_text("0::/\n")
    group(groups, max=limit, current=200)
    assert available_memory() == room


def test_the_limit_of_a_group_above(groups: Path) -> None:
    groups.with_name("membership").write_text("1:name=systemd:/x\n0::/job/step\n")
    group(groups / "job" / "step", max="max", current=100)
    group(groups / "job", max=400, current=150)
    assert available_memory() == 250


def test_cached_files_do_not_count_as_taken(groups: Path) -> None:
    groups.with_name("membership").write_text("0::/\n")
    group(groups, max=700, current=600, stat="anon 300\nactive_file 100\ninactive_file 150\nfile 280")
    assert available_memory() == 350


def test_version_1(groups: Path) -> None:
    groups.with_name("membership").write_text("5:devices:/a\n4:cpu,memory:/docker/abc\n0::/\n")
    # as in a container: the group is the mount itself
    group(
        groups / "memory",
        limit_in_bytes=500,
        usage_in_bytes=200,
        stat="inactive_file 1\ntotal_active_file 20\ntotal_inactive_file 30",
    )
    assert available_memory() == 350
