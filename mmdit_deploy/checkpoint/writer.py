"""A streaming safetensors writer: the layout is planned first, then tensors are written one at a time.

Planning needs names, dtypes and shapes only, so that others (ONNX external data) can point into the file
before a byte of it exists. Writing hashes on the side: SHA-256 runs in a second thread, and the pass over the
data costs no more than the slower of the two. The rejected alternative, hashing the finished file, reads
everything again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmdit_deploy.checkpoint.safetensors_header import DTYPE_NAMES, MAX_HEADER_BYTES, TensorInfo
from mmdit_deploy.hashed_file import HashedFile, WrittenFile, check_free_space

DATA_ALIGNMENT = 64  # bytes; the widest vector loads, and what ONNX Runtime and TensorRT read best
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Layout:
    """Where everything will lie in a safetensors file.

    Attributes:
        header: the first bytes of the file: length, JSON, spaces up to the alignment of the data.
        tensors: by key, in the order of the file, with absolute offsets.
        total_bytes: size of the whole file.
    """

    header: bytes
    tensors: Mapping[str, TensorInfo]
    total_bytes: int


def plan_layout(
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lays tensors out one after the other, in the order given and without padding between them.

    Args:
        entries: key, dtype and shape of each tensor.
        metadata: the header's `__metadata__`; none is written for None. Some loaders want ``{"format":
            "pt"}``.

    Returns:
        The layout; its data begins at a multiple of 64 bytes.

    Raises:
        ValueError: on a repeated or reserved key, a dtype that safetensors does not know, a tensor that would
            not be aligned to its dtype (put the wider dtypes first), or a header beyond the format's limit.
    """
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    spans: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
    end = 0
    for key, dtype, shape in entries:
        if key in header or key == "__metadata__":
            raise ValueError(f"key {key!r} is repeated or reserved")
        if dtype not in _NAME_OF_DTYPE:
            raise ValueError(f"tensor {key!r}: safetensors has no dtype {dtype}")
        if end % dtype.itemsize:
            raise ValueError(f"tensor {key!r} would begin at {end}, not a multiple of {dtype.itemsize} bytes")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAME_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        spans.append((key, dtype, tuple(shape), begin, end - begin))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)  # the format allows trailing spaces
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header would take {len(text)} bytes, the format allows {MAX_HEADER_BYTES}")
    start = 8 + len(text)
    tensors = {key: TensorInfo(key, dtype, shape, start + begin, nbytes) for key, dtype, shape, begin, nbytes in spans}
    return Layout(len(text).to_bytes(8, "little") + text, tensors, start + end)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy; through uint8, because numpy has no bf16 or fp8."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _check(info: TensorInfo, key: str, tensor: torch.Tensor) -> None:
    found = (key, tensor.dtype, tuple(tensor.shape))
    if found != (info.key, info.dtype, info.shape):
        raise ValueError(f"the layout has {(info.key, info.dtype, info.shape)} next, not {found}")
    if tensor.device.type != "cpu":
        raise ValueError(f"tensor {key!r} must be on the CPU, not on {tensor.device}")


def _stream(file: HashedFile, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes the header and every tensor."""
    file.put(layout.header)
    planned = iter(layout.tensors.values())
    for key, tensor in tensors:
        info = next(planned, None)
        if info is None:
            raise ValueError(f"tensor {key!r} comes after the end of the layout")
        _check(info, key, tensor)
        file.put(_bytes_of(tensor.contiguous()))
    missing = next(planned, None)
    if missing is not None:
        raise ValueError(f"the tensors end before {missing.key!r} of the layout")


def write_safetensors(
    path: str | os.PathLike[str], layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]]
) -> WrittenFile:
    """Writes a safetensors file tensor by tensor, hashing it on the way. Only a few tensors are alive at a
    time.

    A file that could not be finished is removed.

    Args:
        path: the file, which must not exist; its folder does.
        layout: from `plan_layout`.
        tensors: key and tensor (on the CPU), in the layout's order. They must not change afterwards: chunks
            of 16 MiB are hashed after they were written, so a reused buffer would spoil the hash.

    Returns:
        Path, size and SHA-256 of the file. It is not synced to the disk: a bundle is, as a whole.

    Raises:
        MachineError: if the disk is too small, before or while writing.
        ValueError: if the tensors are not those of the layout.
        FileExistsError: if the file exists.
    """
    check_free_space(path, layout.total_bytes)
    with HashedFile(path, layout.total_bytes) as file:
        _stream(file, layout, tensors)
    return file.written
