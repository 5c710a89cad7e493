"""The user's cache folder: what may be deleted, copied or broken at any time, and never stops any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mmdit_deploy.atomic import write_whole

Note = Callable[[str], None]


def cache_folder() -> Path | None:
    """``~/.cache/mmdit-deploy``, or where ``XDG_CACHE_HOME`` says; None where the user has no home."""
    # "All paths set in these environment variables must be absolute. […] consider the path invalid and ignore it"
    # (XDG Base Directory Specification)
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "mmdit-deploy"
    try:
        return Path.home() / ".cache" / "mmdit-deploy"
    except RuntimeError:  # no HOME, and no entry in the user database
        return None


def read_cached(file: Path, note: Note = lambda _: None) -> bytes:
    """What is in a cache file; nothing where it is not there, or cannot be read.

    Args:
        note: gets a line if it is there and cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        note(f"the cache is not read: {error}")
        return b""


def write_cached(file: Path, content: bytes, note: Note = lambda _: None) -> bool:
    """Write a cache file, whole or not at all, and its folder with it.

    Args:
        note: gets a line if it cannot be written.

    Returns:
        Whether it was written.
    """
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        note(f"the cache is not kept: {error}")
        return False
    return True
