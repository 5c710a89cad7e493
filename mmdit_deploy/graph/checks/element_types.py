"""ONNX's element types: which there are, and how many bytes a tensor of one takes."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir

KNOWN = frozenset(d.value for d in ir.DataType) - {ir.DataType.UNDEFINED.value}
# No tensor is larger: addresses end there.
MAX_ELEMENTS = 2**48


def elements(dims: Iterable[int]) -> int | None:
    """How many values a shape has; None where it is no shape, or none that any memory holds."""
    dims = list(dims)
    if any(d < 0 for d in dims):
        return None
    if 0 in dims:
        return 0
    count = 1
    for dim in dims:
        count *= dim
        if count > MAX_ELEMENTS:
            return None
    return count


def nbytes_of(data_type: int, dims: Iterable[int]) -> int | None:
    """Bytes of a tensor, packed as in ONNX's raw data; None for strings, and for what is no tensor."""
    count = elements(dims)
    if count is None or data_type not in KNOWN or data_type == ir.DataType.STRING:
        return None
    return -(-count * bits(data_type) // 8)


def bits(data_type: int) -> int:
    """Of one value of a type that is not a string."""
    return int(ir.DataType(data_type).itemsize * 8)


def type_name(data_type: int) -> str:
    """As ONNX writes it: ``FLOAT16``."""
    return onnx.TensorProto.DataType.Name(data_type) if data_type in KNOWN else f"type {data_type}"
