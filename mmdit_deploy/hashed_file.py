"""A new file that is written in one pass and hashed on the side, or that is not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mmdit_deploy.errors import MachineError

_CHUNK_BYTES = 16 * 2**20
_QUEUED_CHUNKS = 4  # bounds what waits for a thread, and so memory
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class WrittenFile:
    """A file that is on the disk.

    Attributes:
        path: where.
        size: in bytes.
        sha256: of all its bytes, in lower-case hex.
    """

    path: Path
    size: int
    sha256: str


class HashedFile:
    """A context manager: leaving it closes the file, or removes it if an error got out. A bundle is synced as a whole.

    Writing and SHA-256 have a thread each (both let go of the interpreter lock), so that the pass costs no more than
    the slowest of making the bytes, writing them and hashing them.

    Args:
        path: the file, which must not exist; its folder does.
        expected: its size in bytes, for the message when the disk is full.

    Raises:
        MachineError: on leaving, if the disk was full.
        FileExistsError: the file exists.
    """

    def __init__(self, path: str | os.PathLike[str], expected: int):
        self.path, self._expected, self._size = Path(path), expected, 0
        # O_EXCL: a fresh file, never through a link to somebody else's
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._digest = hashlib.sha256()
        self._workers = (_Worker(self._write, "write"), _Worker(self._digest.update, "sha256"))
        self._written: WrittenFile | None = None

    def __enter__(self) -> HashedFile:
        return self

    def put(self, data: memoryview | bytes) -> None:
        """Append. The data must not change afterwards: it is written and hashed later.

        Raises:
            OSError: the disk is full or broken.
        """
        data = memoryview(data)
        for start in range(0, len(data), _CHUNK_BYTES):
            for worker in self._workers:
                worker.put(data[start : start + _CHUNK_BYTES])
        self._size += len(data)

    def _write(self, chunk: memoryview) -> None:
        while len(chunk):  # a write may be short
            chunk = chunk[os.write(self._fd, chunk) :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.finish()
        error = error or next((worker.error for worker in self._workers if worker.error is not None), None)
        try:
            os.close(self._fd)
        except OSError as failure:  # some file systems say so late that they are full
            error = error or failure
        if error is None:
            self._written = WrittenFile(self.path, self._size, self._digest.hexdigest())
            return
        self.path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise no_space(self.path, self._expected, f"{error.strerror} while writing") from error
        if kind is None:
            raise error

    @property
    def written(self) -> WrittenFile:
        """What was written; only after the context was left without an error."""
        if self._written is None:
            raise ValueError(f"{self.path} is not finished")
        return self._written


class _Worker:
    """A thread that works through what it is given. After an error it only empties its queue."""

    def __init__(self, work: Callable[[memoryview], object], name: str):
        self._work = work
        self.error: Exception | None = None
        self._queue: queue.Queue[memoryview | None] = queue.Queue(_QUEUED_CHUNKS)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            try:
                if self.error is None:
                    self._work(chunk)
            except Exception as error:
                self.error = error

    def put(self, chunk: memoryview) -> None:
        """Queue a chunk; waits where the queue is full.

        Raises:
            Exception: what an earlier chunk met.
        """
        if self.error is not None:
            raise self.error
        self._queue.put(chunk)

    def finish(self) -> None:
        """Wait until all is done."""
        self._queue.put(None)
        self._thread.join()


def no_space(path: Path, needed: int, received: str) -> MachineError:
    """The error of a disk that is too small for a file."""
    return MachineError(
        f"{path} needs {needed} bytes ({needed / 1e9:.2f} GB) on the disk",
        received=received,
        fix="free space there, or write to another disk with -o",
    )


def check_free_space(path: str | os.PathLike[str], needed: int) -> None:
    """Checks that a file of a given size fits on the disk.

    Args:
        path: the file to be written; its folder exists.
        needed: its size in bytes.

    Raises:
        MachineError: if less is free.
    """
    path = Path(path)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise no_space(path, needed, f"{free} bytes ({free / 1e9:.2f} GB) free in {path.parent}")
