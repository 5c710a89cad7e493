"""Files that appear whole or not at all: a reader may pick one up at any moment, and a writer may be killed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write beside `path`, sync, and rename it there.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the place cannot be written to; what was at `path` is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}"[:200])
    try:
        with partial.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
