"""How much memory this process may still take: the machine's, or less where a container has a limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
# By cgroup version: the limit, what is used of it, and what of that are cached files (memory.stat of the kernel's
# cgroup-v2.rst and cgroup-v1/memory.rst).
_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def available_memory() -> int:
    """Bytes that can be taken without swapping and without being killed.

    psutil knows the machine only. A container's limit, or a job's, is that of its control group or of one above it.
    """
    return max(0, min([psutil.virtual_memory().available, *_rooms()]))


def _rooms() -> Iterator[int]:
    """Bytes left in each control group with a limit that this process is in."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = _MOUNT, _V2
        elif "memory" in controllers.split(","):
            mount, files = _MOUNT / "memory", _V1
        else:
            continue
        group = mount / path.lstrip("/")
        # A container sees its own group as the mount's root, whatever the path says.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (room := _room(folder, *files)) is not None:
                yield room


def _room(folder: Path, limit: str, used: str, cached: tuple[str, ...]) -> int | None:
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
    except (OSError, ValueError):  # no such group, or a limit of "max"
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return left
    # The kernel drops cached files before it kills, and a bundle that was just hashed is one.
    return left + sum(int(stat.get(field, 0)) for field in cached)
