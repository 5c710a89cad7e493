"""The header of a safetensors file: nothing in it is believed before it has been checked against the file.

The format (github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian header length, a JSON
header that begins with ``{`` and may end in spaces, then the data without holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmdit_deploy.checkpoint.strict_json import parse_json_object, quote
from mmdit_deploy.errors import CheckpointError

DTYPE_NAMES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The format's names of dtypes. Sub-byte dtypes (F4, F6) are left out: torch has no views of them."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_RANK = 64  # torch's TensorIterator and numpy go no further
_MAX_SIZE = 2**63 - 1  # torch counts elements and bytes in int64
LENGTH_BYTES = 8

GET_AGAIN = "get the file again, and compare its size and SHA-256 with the publisher's"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file.

    Attributes:
        key: its name.
        dtype: the dtype stored.
        shape: the dims; empty for a scalar.
        offset: absolute byte offset in the file.
        nbytes: size in bytes.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _tensor_info(entry: Any, key: str, data_start: int, where: str) -> TensorInfo:
    """Checks one header entry by itself: dtype, shape, and a range as long as these two say."""
    which = f"tensor {quote(key)} in {where}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{which} must be an object with dtype, shape and data_offsets, and nothing else",
            received=quote(entry),
            fix=GET_AGAIN,
        )
    name, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPE_NAMES:
        raise CheckpointError(
            f"{which} must have one of the dtypes {', '.join(DTYPE_NAMES)}",
            received=f"dtype {quote(name)}",
            fix="store it in one of these dtypes",
        )
    # `type(x) is int`, because bool is an int to isinstance
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(d) is int and d >= 0 for d in shape):
        raise CheckpointError(
            f"{which} must have a shape of at most {MAX_RANK} integers that are 0 or more",
            received=f"shape {quote(shape)}",
            fix=GET_AGAIN,
        )
    dtype = DTYPE_NAMES[name]
    # Zeros count as ones: strides are products of the other dims, and must fit into 63 bits as well.
    if any(d > _MAX_SIZE for d in shape) or math.prod(max(d, 1) for d in shape) * dtype.itemsize > _MAX_SIZE:
        raise CheckpointError(
            f"{which} must have a size that fits into 63 bits",
            received=f"shape {quote(shape)}",
            fix=GET_AGAIN,
        )
    if not isinstance(span, list) or len(span) != 2 or not all(type(o) is int for o in span):
        raise CheckpointError(
            f"{which} must have two integers as data_offsets",
            received=f"data_offsets {quote(span)}",
            fix=GET_AGAIN,
        )
    begin, end = span
    if not 0 <= begin <= end <= _MAX_SIZE:
        raise CheckpointError(
            f"{which} must have data_offsets [begin, end] with 0 <= begin <= end",
            received=f"data_offsets {quote(span)}",
            fix=GET_AGAIN,
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{which} must take as many bytes as its shape {shape} and dtype {name} say: {nbytes}",
            received=f"data_offsets {span}: {end - begin} bytes",
            fix=GET_AGAIN,
        )
    return TensorInfo(key, dtype, tuple(shape), data_start + begin, nbytes)


def _check_coverage(infos: list[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    """Checks that the tensors, sorted by place, cover the data exactly: no overlap, no gap, no rest."""
    end, before = data_start, "the header"
    for info in infos:
        if info.offset != end:
            fault = "overlaps" if info.offset < end else "leaves a gap after"
            raise CheckpointError(
                f"the tensors in {where} must lie one after the other, without gaps",
                received=f"tensor {quote(info.key)} begins at byte {info.offset} and {fault} {before}, "
                f"which ends at byte {end}",
                fix=GET_AGAIN,
            )
        end, before = info.offset + info.nbytes, f"tensor {quote(info.key)}"
    if end > file_size:
        cut = next(info for info in infos if info.offset + info.nbytes > file_size)
        raise CheckpointError(
            f"{where} must hold all tensors that its header names: {end} bytes in all",
            received=f"{file_size} bytes: truncated, {end - file_size} bytes are missing, "
            f"from tensor {quote(cut.key)} on",
            fix=GET_AGAIN,
        )
    if end < file_size:
        raise CheckpointError(
            f"{where} must end with its last tensor, at byte {end}",
            received=f"{file_size} bytes: {file_size - end} trailing bytes after {before}",
            fix=GET_AGAIN,
        )


def parse_header(header: bytes, file_size: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parses and checks the JSON header of a safetensors file.

    Args:
        header: the header's bytes, without the 8 bytes of its length.
        file_size: the size of the whole file in bytes.
        where: how to name the file in messages.

    Returns:
        The tensors by key, in the order of the file's data, and the metadata.

    Raises:
        CheckpointError: if anything in it breaks the format or does not fit the file.
    """
    entries = parse_json_object(header, f"the header of {where}", GET_AGAIN)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"__metadata__ of {where} must map strings to strings", received=quote(metadata), fix=GET_AGAIN
        )
    data_start = LENGTH_BYTES + len(header)
    infos = [_tensor_info(entry, key, data_start, where) for key, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(infos, data_start, file_size, where)
    return {info.key: info for info in infos}, metadata
