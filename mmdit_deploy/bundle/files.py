"""What lies in a bundle's directory: a listing that follows no links, and SHA-256 of many files at once."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_CHUNK_BYTES = 16 * 2**20
_THREADS = 2  # one keeps the weights busy, the other takes all the small files


def graph_file(dialect: str, part: str = "model") -> str:
    """The name of a lowered graph in a bundle: of the whole model, or of its ``conditioning`` or ``trunk``."""
    return f"{part}.{dialect}.onnx"


class FileRecord(NamedTuple):
    """What the manifest says about one file: its size in bytes, and its SHA-256 in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """Everything in a directory and below, by path relative to it, with forward slashes and in sorted order.

    Attributes:
        regular: size in bytes of each regular file.
        other: what each thing is that is neither a regular file nor a directory, e.g. ``a symbolic link``.
    """

    regular: Mapping[str, int]
    other: Mapping[str, str]


def list_files(directory: Path) -> Listing:
    """Lists a directory and all below, without following links.

    Args:
        directory: where to begin.

    Returns:
        The listing; directories themselves are not in it.

    Raises:
        OSError: a directory cannot be read.
    """
    regular: dict[str, int] = {}
    other: dict[str, str] = {}

    def visit(folder: Path, prefix: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    visit(folder / entry.name, f"{prefix}{entry.name}/")
                elif stat.S_ISREG(status.st_mode):
                    regular[prefix + entry.name] = status.st_size
                else:
                    link = stat.S_ISLNK(status.st_mode)
                    other[prefix + entry.name] = "a symbolic link" if link else "a special file"

    visit(directory, "")
    return Listing(dict(sorted(regular.items())), dict(sorted(other.items())))


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Hashes files, two at a time, the largest first.

    Args:
        directory: where the names begin.
        names: paths relative to it, of regular files.

    Returns:
        Size and SHA-256 by name, as they were read.

    Raises:
        OSError: a file cannot be read, or is a symbolic link; `filename` says which.
    """
    largest_first = sorted(names, key=lambda name: -(directory / name).lstat().st_size)
    stop = threading.Event()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sha256")
    try:
        futures = {name: pool.submit(_hash_file, directory / name, stop) for name in largest_first}
        return {name: future.result() for name, future in futures.items()}
    finally:
        # On an error or Ctrl-C nobody waits for gigabytes that are still to be hashed.
        stop.set()
        pool.shutdown(cancel_futures=True)


def _hash_file(path: Path, stop: threading.Event) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb", buffering=0) as file:
            chunk = memoryview(bytearray(max(1, min(os.fstat(fd).st_size, _CHUNK_BYTES))))
            while not stop.is_set() and (count := file.readinto(chunk)):
                digest.update(chunk[:count])
                size += count
    except OSError as error:
        # an error of reading, unlike one of opening, does not know the file's name
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(size, digest.hexdigest())
