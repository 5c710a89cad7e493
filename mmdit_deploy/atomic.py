"""Files that appear whole or not at all: a reader may pick one up at any moment, and a writer may be killed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write beside `path`, sync, and rename it there.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the place cannot be written to; what was at `path` is as it was.
    """
    with written_together([Path(path)]) as (partial,):
        write_synced(partial, content)


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a new file, and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def written_together(paths: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """Files that appear together: all of them, or on any error none.

    One rename is atomic, and several are not: a process killed between two of them leaves the first files new and the
    others as they were.

    Args:
        paths: of the files; their folders must exist.

    Yields:
        Where to write each of them. What is there at the end of the context takes the place of `paths`.
    """
    partials = tuple(_beside(path) for path in paths)
    try:
        yield partials
        _place(partials, paths)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}"[:200])


def _place(partials: Sequence[Path], paths: Sequence[Path]) -> None:
    """Rename each; where one cannot be renamed, undo those before it."""
    with contextlib.ExitStack() as second_names, contextlib.ExitStack() as undo:
        for partial, path in zip(partials[:-1], paths[:-1], strict=True):
            if os.path.lexists(path):
                old = _second_name(path)
                second_names.callback(old.unlink, missing_ok=True)
                undo.callback(os.replace, old, path)
            else:
                undo.callback(path.unlink, missing_ok=True)
            os.replace(partial, path)
        os.replace(partials[-1], paths[-1])
        undo.pop_all()


def _second_name(path: Path) -> Path:
    """Another name of the file at `path`; where there are no hard links, its only one for a moment."""
    old = _beside(path)
    try:
        os.link(path, old, follow_symlinks=False)
    except OSError:
        os.replace(path, old)
    return old
