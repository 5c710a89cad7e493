"""Arrays of torch, numpy and others as torch tensors over the same memory, and results as numpy arrays.

torch tensor    itself
numpy array     its memory, read-only arrays' too: nothing writes to an input. Copied where torch cannot hold it so:
                steps backwards, or addresses that are no multiple of an element
__dlpack__      its memory (CuPy, JAX, …), on whichever device it is
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from mmdit_deploy.errors import ContractError

BFLOAT16 = "bfloat16"  # numpy's by ml_dtypes, which torch does not know


class DLPack(Protocol):
    """An array that lends its memory (data-apis.org/array-api, "Data interchange mechanisms")."""

    def __dlpack__(self, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


Array = Tensor | np.ndarray | DLPack


def as_tensors(arrays: Mapping[str, Array]) -> tuple[dict[str, Tensor], bool]:
    """Arrays as torch tensors.

    Returns:
        The tensors by name, and whether all arrays are numpy's.

    Raises:
        ContractError: one is none, or torch has no such type.
    """
    tensors, numpy = {}, 0
    for name, array in arrays.items():
        if isinstance(array, Tensor):
            tensors[name] = array.resolve_neg()  # itself, but for views whose memory has the other sign
        elif isinstance(array, np.ndarray):
            tensors[name] = from_numpy(name, array)
            numpy += 1
        else:
            tensors[name] = _from_dlpack(name, array)
    return tensors, 0 < numpy == len(tensors)


def from_numpy(name: str, array: np.ndarray) -> Tensor:
    """A numpy array as a tensor: over its memory where that is aligned and no axis runs backwards, else a copy.

    Raises:
        ContractError: torch has no such type.
    """
    if not array.dtype.isnative:
        raise _unknown(name, f"a numpy array of {array.dtype.str}", f"{name}.astype({name}.dtype.newbyteorder())")
    if not array.flags.aligned or min(array.strides, default=0) < 0:
        array = array.copy()
    short = array.dtype.kind == "V" and array.dtype.name == BFLOAT16
    if short:
        array = array.view(np.int16)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))  # torch warns of an array that it might write to
    try:
        tensor = torch.from_numpy(array)
    except TypeError:
        raise _unknown(
            name, f"a numpy array of {array.dtype}", "convert it to the type that the contract says"
        ) from None
    return tensor.view(torch.bfloat16) if short else tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor of the CPU as a numpy array over its memory; bf16 in ml_dtypes' type."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def span(array: Tensor | np.ndarray) -> tuple[int, int]:
    """Where an array's memory begins and ends: everything between its first and its last element."""
    if isinstance(array, Tensor):
        start, size = array.data_ptr(), array.element_size()
        if array.is_contiguous():
            return start, start + array.nbytes
        steps = [step * size for step in array.stride()]
    else:
        start, size, steps = array.ctypes.data, array.itemsize, list(array.strides)
        if array.flags.c_contiguous:
            return start, start + array.nbytes
    reach = [(length - 1) * step for length, step in zip(array.shape, steps, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + size


class _Writable:
    """A read-only array's memory, said to be writable. It holds the array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _from_dlpack(name: str, array: Any) -> Tensor:
    if not hasattr(array, "__dlpack__"):
        raise _unknown(name, type(array).__name__, f"torch.as_tensor({name})")
    try:
        tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip() or type(error).__name__
        raise _unknown(name, f"{type(array).__name__}, whose __dlpack__ failed: {said.splitlines()[0]}") from error
    return tensor


def _unknown(name: str, received: str, fix: str = "pass a torch tensor or a numpy array") -> ContractError:
    return ContractError(
        f"{name} is a torch tensor, a numpy array or an array with __dlpack__, of a type that torch has",
        received=received,
        fix=fix,
    )
