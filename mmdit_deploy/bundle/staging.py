"""Staging directories: where a bundle is written before it has its name, and how leftovers of killed runs go.

    .partial-<name>-<random>/
        lock        flock'ed by the run that writes, for as long as it lives
        bundle/     what becomes the bundle; after an exchange, the bundle that was replaced

The lock lies beside the content and not in it: the content is renamed away without a moment in which a kill
would leave something that has no lock, and so no known owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

PREFIX = ".partial-"
_LOCK = "lock"
_CONTENT = "bundle"
_NAME_CHARACTERS = 50  # of the bundle's name; four bytes each at most, and file names have 255
_TRIES = 100


@dataclass(frozen=True)
class Staging:
    """One staging directory, owned by this process.

    Attributes:
        container: the directory named ``.partial-…``.
        content: the directory in it that becomes the bundle.
        lock: the descriptor that holds the lock.
    """

    container: Path
    content: Path
    lock: int

    def discard(self) -> None:
        """Removes the directory with what is still in it, as far as possible, and lets go of the lock."""
        try:
            _remove(self.container)
        finally:
            os.close(self.lock)


def create_staging(parent: Path, name: str) -> Staging:
    """Makes a locked staging directory with an empty content directory.

    Args:
        parent: an existing directory.
        name: what the bundle will be called.

    Returns:
        The staging directory; call `discard` at the end in any case.

    Raises:
        OSError: the directory cannot be written.
    """
    for _ in range(_TRIES):
        container = parent / f"{PREFIX}{name[:_NAME_CHARACTERS]}-{secrets.token_hex(4)}"
        try:
            container.mkdir()
        except FileExistsError:
            continue
        lock = _lock_new(container)
        if lock is None:
            continue
        staging = Staging(container, container / _CONTENT, lock)
        try:
            staging.content.mkdir()
        except BaseException:
            staging.discard()
            raise
        return staging
    raise FileExistsError(errno.EEXIST, f"no free name for a directory {PREFIX}*", str(parent))


def _lock_new(container: Path) -> int | None:
    """Locks a container just made; None if another run took it for an abandoned one in the meantime."""
    path = container / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    except OSError:
        with contextlib.suppress(OSError):
            container.rmdir()
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(lock)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def clear_abandoned(parent: Path) -> int:
    """Removes the staging directories whose owner is dead: their lock can be taken.

    What has no lock of ours is left alone unless it is empty: a run killed at its very first step leaves an
    empty directory, and a run at that step in this moment starts over with another one.

    Args:
        parent: where to look.

    Returns:
        How many were removed.
    """
    removed = 0
    for container in sorted(parent.glob(PREFIX + "*")):
        if container.is_symlink() or not container.is_dir():
            continue
        try:
            lock = os.open(container / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            with contextlib.suppress(OSError):  # not empty, so not ours
                container.rmdir()
                removed += 1
            continue
        except OSError:  # another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(container)
            removed += not container.exists()
        except OSError:  # its owner lives, or this file system has no locks to tell
            continue
        finally:
            os.close(lock)
    return removed


def _remove(container: Path) -> None:
    """Removes a container as far as possible, the lock last, so that the next run can resume."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(container):
            if entry != _LOCK:
                shutil.rmtree(container / entry, ignore_errors=True)
        if os.listdir(container) == [_LOCK]:
            (container / _LOCK).unlink()
            container.rmdir()
