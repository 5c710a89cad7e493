"""The C API, bound by ctypes as any other language would bind it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "bool": 3}
STATUSES = {1: "usage", 2: "bundle", 3: "contract", 4: "machine", 5: "internal"}


class Options(ctypes.Structure):
    """`mmdit_options`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("target", ctypes.c_char_p),
        ("device", ctypes.c_int),
        ("verify", ctypes.c_int),
        ("receipts", ctypes.c_char_p),
        ("threads", ctypes.c_int),
        ("specialize", ctypes.c_int),
        ("runtime_cache", ctypes.c_char_p),
    )


class Tensor(ctypes.Structure):
    """`mmdit_tensor`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    )


class Spec(ctypes.Structure):
    """`mmdit_tensor_spec`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("axes", ctypes.POINTER(ctypes.c_char_p)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
    )


class Refused(Exception):
    """An `mmdit_error`."""

    def __init__(self, status: int, rule: str, received: str, fix: str, message: str):
        self.kind, self.rule, self.received, self.fix = STATUSES[status], rule, received, fix
        super().__init__(message)


def library(path: Path) -> Any:
    """The library, with the types of what returns something other than an int."""
    lib = ctypes.CDLL(str(path))
    for name in ("message", "rule", "received", "fix"):
        getattr(lib, f"mmdit_error_{name}").restype = ctypes.c_char_p
    for name in ("name", "target"):
        getattr(lib, f"mmdit_engine_{name}").restype = ctypes.c_char_p
    lib.mmdit_engine_time_scale.restype = ctypes.c_double
    lib.mmdit_engine_input_count.restype = lib.mmdit_engine_output_count.restype = ctypes.c_size_t
    return lib


def tensor(name: str | None, array: np.ndarray, **other: Any) -> Tensor:
    """An array as `mmdit_tensor`; fields may be set otherwise."""
    fields = {
        "name": None if name is None else name.encode(),
        "dtype": DTYPES[array.dtype.name],
        "rank": array.ndim,
        "shape": (ctypes.c_int64 * max(array.ndim, 1))(*array.shape),
        "data": array.ctypes.data,
    }
    return Tensor(**{**fields, **other})


class CEngine:
    """An engine by the C API."""

    def __init__(self, lib: Any, bundle: Path, **options: Any):
        self.lib, self._handle = lib, ctypes.c_void_p()
        given = Options(**{"struct_size": ctypes.sizeof(Options), **options})
        self._call("mmdit_engine_load", str(bundle).encode(), ctypes.byref(given), ctypes.byref(self._handle))

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int | None = None) -> None:
        """One step."""
        self._call("mmdit_engine_run", self._handle, *_array(inputs), *_array(outputs), ctypes.c_void_p(stream))

    def condition(self, inputs: Sequence[Tensor]) -> ctypes.c_void_p:
        """A schedule's conditioning."""
        table = ctypes.c_void_p()
        self._call("mmdit_engine_condition", self._handle, *_array(inputs), None, ctypes.byref(table))
        return table

    def run_step(self, inputs: Sequence[Tensor], table: ctypes.c_void_p, step: int, outputs: Sequence[Tensor]) -> None:
        """One step of a schedule."""
        self._call(
            "mmdit_engine_run_step", self._handle, *_array(inputs), table, ctypes.c_size_t(step), *_array(outputs), None
        )

    def specs(self, kind: str) -> Mapping[str, tuple[int, list[str | int]]]:
        """The dtype and the axes of each input or output."""
        found = {}
        for index in range(getattr(self.lib, f"mmdit_engine_{kind}_count")(self._handle)):
            spec = Spec()
            assert not getattr(self.lib, f"mmdit_engine_{kind}")(
                self._handle, ctypes.c_size_t(index), ctypes.byref(spec)
            )
            axes = [spec.axes[i].decode() if spec.axes[i] else spec.sizes[i] for i in range(spec.rank)]
            found[spec.name.decode()] = (spec.dtype, axes)
        return found

    def range(self, axis: str) -> tuple[int, ...] | None:
        """The sizes that an axis may have; None where there is no such axis."""
        sizes = [ctypes.c_int64() for _ in range(3)]
        status = self.lib.mmdit_engine_range(self._handle, axis.encode(), *map(ctypes.byref, sizes))
        return None if status else tuple(size.value for size in sizes)

    def text(self, what: str) -> str:
        """The engine's name or target."""
        return getattr(self.lib, f"mmdit_engine_{what}")(self._handle).decode()

    def close(self) -> None:
        """Free it."""
        self.lib.mmdit_engine_free(self._handle)

    def _call(self, function: str, *arguments: Any) -> None:
        error = ctypes.c_void_p()
        status = getattr(self.lib, function)(*arguments, ctypes.byref(error))
        assert bool(status) == bool(error)
        if status:
            parts = [
                getattr(self.lib, f"mmdit_error_{n}")(error).decode() for n in ("rule", "received", "fix", "message")
            ]
            assert self.lib.mmdit_error_status(error) == status
            self.lib.mmdit_error_free(error)
            raise Refused(status, *parts)


def _array(tensors: Sequence[Tensor]) -> tuple[Any, ctypes.c_size_t]:
    return (Tensor * len(tensors))(*tensors), ctypes.c_size_t(len(tensors))
