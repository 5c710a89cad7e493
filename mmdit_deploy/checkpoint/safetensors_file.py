"""A strict, lazy reader of one untrusted `.safetensors` file.

The header is checked first, down to the last byte of the file. The weights are mapped, never read: a tensor
is a view of the page cache, so that the anonymous memory of the process stays flat however large the file is.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import torch

from mmdit_deploy.checkpoint.safetensors_header import (
    GET_AGAIN,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    parse_header,
)
from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import CheckpointError

_PICKLE = "convert it where you trust it: load it with PyTorch and save it with safe_serialization=True"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle checkpoint?) under another name", _PICKLE),
    (b"\x80\x02", "a pickle under another name", _PICKLE),
    (b"\x80\x03", "a pickle under another name", _PICKLE),
    (b"\x80\x04", "a pickle under another name", _PICKLE),
    (b"\x80\x05", "a pickle under another name", _PICKLE),
    (b"GGUF", "a GGUF file under another name", "pass the diffusers folder that it was made from"),
    (b"\x89HDF", "an HDF5 file under another name", "pass a diffusers folder"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (b"<!", "an HTML page (a failed download?)", GET_AGAIN),
    (b"<html", "an HTML page (a failed download?)", GET_AGAIN),
)


def _read_header(fd: int, file_size: int, where: str) -> bytes:
    """Reads the header's bytes, after checking that this can be a safetensors file at all."""
    rule = f"{where} must be a safetensors file"
    if file_size == 0:
        raise CheckpointError(rule, received="an empty file (0 bytes)", fix=GET_AGAIN)
    head = os.pread(fd, 32, 0)
    # A length may look like a magic number (0x80 0x02: a header of 640 bytes), but then "{" follows it.
    if head[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        for magic, what, fix in _FOREIGN:
            if head.startswith(magic):
                raise CheckpointError(rule, received=what, fix=fix)
    if len(head) < LENGTH_BYTES:
        raise CheckpointError(
            rule,
            received=f"{file_size} bytes: too short for the 8 bytes of the header's length",
            fix=GET_AGAIN,
        )
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{rule}, with a header of at most {MAX_HEADER_BYTES} bytes",
            received=f"a header length of {length} bytes (begins with {quote(head[:8])})",
            fix=GET_AGAIN,
        )
    if LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            rule,
            received=f"{file_size} bytes: truncated, {LENGTH_BYTES + length - file_size} bytes of "
            f"the header of {length} bytes are missing",
            fix=GET_AGAIN,
        )
    if head[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or length == 0:
        raise CheckpointError(
            f"the header of {where} must begin with '{{'", received=quote(head[LENGTH_BYTES:]), fix=GET_AGAIN
        )
    header = os.pread(fd, length, LENGTH_BYTES)
    if len(header) != length:
        raise CheckpointError(rule, received="the file became shorter while it was read", fix=GET_AGAIN)
    return header


class SafetensorsFile:
    """One open safetensors file: what is in it, and its tensors as views.

    Args:
        path: the file. Symbolic links are followed.

    Attributes:
        path: as given.
        size: of the file, in bytes.
        tensors: every tensor by key, in the order of the file's data.
        metadata: the header's `__metadata__`.

    Raises:
        CheckpointError: if the file cannot be opened, or is not a safetensors file down to the last byte.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        where = str(self.path)
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{where} must be a readable file",
                received=str(error),
                fix="check the path and its permissions",
            ) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(
                    f"{where} must be a safetensors file",
                    received="not a regular file",
                    fix="pass a file, or a diffusers folder to open_checkpoint",
                )
            self.size = status.st_size
            header = _read_header(fd, self.size, where)
            self.tensors, self.metadata = parse_header(header, self.size, where)
            # Private and writable, because torch warns about views of read-only buffers and a stray in-place
            # op would kill the process; a write goes to a private copy of the page. MAP_NORESERVE (0x4000 on
            # Linux; Python names it from 3.13): the kernel must not count the mapping against memory, a file
            # may be larger.
            self._map: mmap.mmap | None = mmap.mmap(
                fd,
                self.size,
                flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000),
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(fd)

    def read(self, key: str) -> torch.Tensor:
        """Gives one tensor, as a view of the mapped file (a copy only where the file is not aligned to the
        dtype).

        The view stays valid after `close`. The file must not be truncated meanwhile. Treat it as read-only:
        what is written to it is seen by this process alone.

        Args:
            key: one of `tensors`.

        Returns:
            The tensor, in the dtype and shape stored.

        Raises:
            CheckpointError: if there is no such tensor.
            ValueError: if the file is closed.
        """
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(
                f"{self.path} must hold the tensor {quote(key)}",
                received=f"{len(self.tensors)} tensors, without it",
                fix="check that the file fits the architecture",
            )
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        if data.data_ptr() % info.dtype.itemsize:
            data = data.clone()
        return data.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        """Lets go of the file; the mapping lives on until the last view of it is gone."""
        self._map = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
