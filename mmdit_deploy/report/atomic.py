"""Files that appear whole or not at all: a CI job may pick a report up at any moment."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str) -> None:
    """Write UTF-8 text beside `path`, then rename it there; missing folders are made.

    Raises:
        OSError: the place cannot be written to; what was at `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_text(content, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
