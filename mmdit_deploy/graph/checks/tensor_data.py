"""Tensors in an ONNX file: each of a type that exists, with as many values as its shape says, and no NaN.

Infinities are values like others: attention masks are made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.checks.element_types import KNOWN, bits, elements, type_name
from mmdit_deploy.graph.checks.external_data import is_external
from mmdit_deploy.graph.walk import model_attributes, model_graphs, model_tensors, named

_T = onnx.TensorProto
_AGAIN = "get the file again, or export it again"
_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data")
_FIELD_OF: dict[int, str] = {
    _T.FLOAT: "float_data",
    _T.COMPLEX64: "float_data",
    _T.DOUBLE: "double_data",
    _T.COMPLEX128: "double_data",
    _T.INT64: "int64_data",
    _T.UINT32: "uint64_data",
    _T.UINT64: "uint64_data",
    _T.STRING: "string_data",
}  # and int32_data for all others
_COMPLEX = (_T.COMPLEX64, _T.COMPLEX128)

_IsNan = Callable[[np.ndarray], np.ndarray]
# How a value is stored, and which bits of it are NaN: numpy does not know all of the types.
_NAN: dict[int, tuple[str, _IsNan]] = {
    _T.FLOAT: ("<u4", lambda u: (u & 0x7FFFFFFF) > 0x7F800000),
    _T.COMPLEX64: ("<u4", lambda u: (u & 0x7FFFFFFF) > 0x7F800000),
    _T.DOUBLE: ("<u8", lambda u: (u & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000),
    _T.COMPLEX128: ("<u8", lambda u: (u & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000),
    _T.FLOAT16: ("<u2", lambda u: (u & 0x7FFF) > 0x7C00),
    _T.BFLOAT16: ("<u2", lambda u: (u & 0x7FFF) > 0x7F80),
    _T.FLOAT8E4M3FN: ("u1", lambda u: (u & 0x7F) == 0x7F),
    _T.FLOAT8E5M2: ("u1", lambda u: (u & 0x7F) > 0x7C),
    _T.FLOAT8E4M3FNUZ: ("u1", lambda u: u == 0x80),
    _T.FLOAT8E5M2FNUZ: ("u1", lambda u: u == 0x80),
    _T.FLOAT8E8M0: ("u1", lambda u: u == 0xFF),
}
_CHUNK = 1 << 20  # bytes looked at at once


def check_tensors(model: onnx.ModelProto) -> None:
    """Check every tensor of a model, and every number in an attribute; of external weights the shape and type.

    Raises:
        UsageError: the first that is not sound, by its name.
    """
    _check_not_sparse(model)
    for tensor, what in model_tensors(model):
        _check_type(tensor, what)
        _check_size(tensor, what)
        if _has_nan(tensor):
            raise _nan(f"{what} has NaN")
    for attribute, what in model_attributes(model):
        if any(math.isnan(value) for value in (attribute.f, *attribute.floats)):
            raise _nan(f"{what} is NaN")


def _check_type(tensor: onnx.TensorProto, what: str) -> None:
    if tensor.data_type not in KNOWN:
        raise UsageError(
            "a tensor must be of one of ONNX's element types",
            received=f"{what} is of type {tensor.data_type}",
            fix=_AGAIN,
        )
    if elements(tensor.dims) is None:
        raise UsageError(
            "a tensor's shape must be one that some memory holds: no negative dims, no product out of range",
            received=f"{what} is [{', '.join(map(str, tensor.dims[:8]))}{', …' if len(tensor.dims) > 8 else ''}]",
            fix=_AGAIN,
        )


def _check_size(tensor: onnx.TensorProto, what: str) -> None:
    found = {field: len(getattr(tensor, field)) for field in _FIELDS}
    found = {field: count for field, count in found.items() if count}
    if found != _expected(tensor, "raw_data" in found):
        shown = ", ".join(f"{count} in {field}" for field, count in found.items()) or "nothing"
        external = ", whose data are external," if is_external(tensor) else ""
        raise UsageError(
            "a tensor must have the data that its type and shape say, in one place",
            received=f"{what}, {type_name(tensor.data_type)} {list(tensor.dims)},{external} has {shown}",
            fix=_AGAIN,
        )


def _expected(tensor: onnx.TensorProto, raw: bool) -> dict[str, int]:
    """Which field has how many entries: bytes of raw data, else values, where types below a byte are packed."""
    count = 0 if is_external(tensor) else elements(tensor.dims)
    if not count:
        return {}
    if tensor.data_type == _T.STRING:
        return {"string_data": count}
    nbytes = -(-count * bits(tensor.data_type) // 8)
    if raw:
        return {"raw_data": nbytes}
    packed = nbytes if bits(tensor.data_type) < 8 else count
    return {_FIELD_OF.get(tensor.data_type, "int32_data"): 2 * count if tensor.data_type in _COMPLEX else packed}


def _has_nan(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in _NAN or is_external(tensor):
        return False
    return any(is_nan.any() for is_nan in _nan_by_chunk(tensor))


def _nan_by_chunk(tensor: onnx.TensorProto) -> Iterator[np.ndarray]:
    dtype, is_nan = _NAN[tensor.data_type]
    raw = tensor.raw_data
    for start in range(0, len(raw), _CHUNK):
        yield is_nan(np.frombuffer(raw[start : start + _CHUNK], dtype))
    yield np.isnan(np.array(tensor.float_data, np.float64))
    yield np.isnan(np.array(tensor.double_data, np.float64))
    if tensor.data_type not in _FIELD_OF:  # 16 bits or fewer of an int32
        yield is_nan(np.array(tensor.int32_data, np.int64) & (256 ** np.dtype(dtype).itemsize - 1))


def _nan(received: str) -> UsageError:
    return UsageError(
        "constants of a graph must be numbers: what is computed from NaN is NaN",
        received=received,
        fix="find what made it, usually an overflow in a 16-bit type, and export again",
    )


def _check_not_sparse(model: onnx.ModelProto) -> None:
    def refused(what: str) -> UsageError:
        return UsageError("sparse tensors are not supported", received=what, fix="save the model with dense weights")

    for graph in model_graphs(model):
        for sparse in graph.sparse_initializer:
            raise refused(f"the sparse initializer {named(sparse.values.name)}")
    for attribute, what in model_attributes(model):
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise refused(what)
