"""A file that is written in one pass and hashed on the side, or that is not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdit_deploy import hashed_file
from mmdit_deploy.errors import MachineError
from mmdit_deploy.hashed_file import HashedFile, check_free_space


@pytest.fixture
def failing_write(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writing fails from the n-th call on: ``failing_write(errno.ENOSPC, after=1)``."""

    def arrange(number: int, after: int = 0) -> None:
        write, calls = os.write, iter(range(10**6))

        def fail(fd: int, data: memoryview) -> int:
            if next(calls) < after:
                return write(fd, data)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(hashed_file.os, "write", fail)

    return arrange


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "sha256"]


@pytest.mark.parametrize("parts", [(), (b"",), (b"abc",), (b"a" * 1000, b"", b"b", b"c" * 77)])
def test_what_was_put_is_in_the_file_and_in_the_hash(tmp_path: Path, parts: tuple[bytes, ...]) -> None:
    with HashedFile(tmp_path / "f", 0) as file:
        for part in parts:
            file.put(part)
    data = b"".join(parts)
    assert (tmp_path / "f").read_bytes() == data
    assert file.written.path == tmp_path / "f"
    assert (file.written.size, file.written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert not threads()


def test_data_of_many_chunks_and_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than may wait for the hash, each written in pieces."""
    monkeypatch.setattr(hashed_file, "_CHUNK_BYTES", 64)
    write = os.write
    monkeypatch.setattr(hashed_file.os, "write", lambda fd, data: write(fd, data[:23]))
    data = bytes(i * i % 251 for i in range(64 * 50 + 3))
    with HashedFile(tmp_path / "f", len(data)) as file:
        file.put(memoryview(data)[:100])
        file.put(data[100:])
    assert (tmp_path / "f").read_bytes() == data
    assert file.written.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_what_was_needed(
    tmp_path: Path, failing_write: Callable[..., None], number: int
) -> None:
    failing_write(number, after=1)
    with pytest.raises(MachineError, match=r"f needs 4000000 bytes \(0\.00 GB\) on the disk") as caught:
        with HashedFile(tmp_path / "f", 4_000_000) as file:
            file.put(b"fits")
            file.put(b"does not")
    assert caught.value.exit_status == 3
    assert caught.value.received == f"{os.strerror(number)} while writing" and caught.value.fix
    assert list(tmp_path.iterdir()) == [] and not threads()


def test_another_error_of_the_disk_stays_what_it_is(tmp_path: Path, failing_write: Callable[..., None]) -> None:
    failing_write(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), HashedFile(tmp_path / "f", 10) as file:
        file.put(b"x")
    assert list(tmp_path.iterdir()) == [] and not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MachineError("too hot")])
def test_whatever_gets_out_removes_the_file(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    with pytest.raises(error if isinstance(error, type) else type(error)):
        with HashedFile(tmp_path / "f", 10) as file:
            file.put(b"half")
            raise error
    assert list(tmp_path.iterdir()) == [] and not threads()
    with pytest.raises(ValueError, match="not finished"):
        _ = file.written


def test_it_is_not_finished_before_its_end(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "f", 1) as file:
        file.put(b"x")
        with pytest.raises(ValueError, match="not finished"):
            _ = file.written


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("mine", "link", "dangling"):
        with pytest.raises(FileExistsError):
            HashedFile(tmp_path / name, 1)
    assert (tmp_path / "mine").read_bytes() == b"precious" and not (tmp_path / "nothing").exists()
    with pytest.raises(FileNotFoundError):
        HashedFile(tmp_path / "no" / "folder", 1)
    assert not threads()


def test_free_space_is_checked_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=2_500_000_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    check_free_space(tmp_path / "f", 2_500_000_000)
    with pytest.raises(MachineError, match=r"f needs 2500000001 bytes \(2\.50 GB\)") as caught:
        check_free_space(tmp_path / "f", 2_500_000_001)
    assert caught.value.received == f"2500000000 bytes (2.50 GB) free in {tmp_path}"
    assert asked == [tmp_path, tmp_path]  # the file's folder, whichever disk that is on
