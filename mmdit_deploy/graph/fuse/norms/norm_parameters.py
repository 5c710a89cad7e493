"""What the weight or bias of a norm may be: of the normalized axes' shape, and the same for all tokens and samples."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.fuse.norms.spelled_norm import made_by

# A norm's own weights are looked at, to see whether they are ones or exact in 16 bits; no model is wider than this.
_SMALL = 1 << 14
_MOVES = ("Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_ARITHMETIC = ("Add", "Cast", "Mul", "Neg", "Sub")  # such as 1 + w
_DEPTH = 8


def is_ones(value: ir.Value) -> bool:
    """Whether a value is a constant of ones."""
    array = _small(value)
    return array is not None and bool(np.all(array == 1))


def parameter_of(value: ir.Value, normed: ir.Value, axis: int) -> ir.Value | None:
    """The weight or bias that a norm's result is multiplied by or added to, before what only gives it more axes.

    Args:
        value: the other factor or summand.
        normed: the norm's result.
        axis: the first normalized one, counted from the end.

    Returns:
        A value of the normalized axes' shape, with axes of 1 before them at most; None where it is no such thing.
    """
    if normed.shape is None:
        return None
    shape = list(normed.shape[axis:])
    if not all(isinstance(size, int) for size in shape) or not _broadcasts(value, list(normed.shape), shape):
        return None
    while (move := made_by(value, *_MOVES)) is not None and _keeps(move, shape):
        assert move.inputs[0] is not None
        value = move.inputs[0]
    if value.shape is None or not _ends_in(list(value.shape), shape) or not _is_weight(value, len(shape)):
        return None
    return value


def in_type(value: ir.Value, dtype: ir.DataType) -> ir.Value | ir.TensorProtocol | None:
    """A weight in another type, where it has the very same numbers: before its cast, or as a new constant."""
    cast = made_by(value, "Cast")
    if cast is not None and cast.inputs[0] is not None and cast.inputs[0].dtype == dtype:
        return cast.inputs[0]
    array = _small(value)
    if array is None:
        return None
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype.numpy())
    return ir.tensor(narrow, dtype=dtype) if np.array_equal(narrow.astype(array.dtype), array) else None


def _small(value: ir.Value) -> np.ndarray | None:
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or not 0 < tensor.size <= _SMALL:
        return None
    try:
        return tensor.numpy()
    except (OSError, ValueError):  # of external data that are not there yet
        return None


def _broadcasts(value: ir.Value, normed: list[int | ir.SymbolicDim], shape: Sequence[object]) -> bool:
    """Whether a value has the normalized axes whole, and gives the norm's result no other shape."""
    if value.shape is None or not len(shape) <= len(value.shape) <= len(normed):
        return False
    sizes = list(value.shape)
    before, last = sizes[: -len(shape)], sizes[-len(shape) :]
    pairs = zip(reversed(before), reversed(normed[: -len(shape)]), strict=False)
    return last == list(shape) and all(size == 1 or (size == own and _is_named(size)) for size, own in pairs)


def _is_named(size: int | ir.SymbolicDim) -> bool:
    """Whether two equal dims are one: not where nothing is known of either."""
    return isinstance(size, int) or size.value is not None


def _ends_in(sizes: Sequence[object], shape: Sequence[object]) -> bool:
    before = len(sizes) - len(shape)
    return before >= 0 and list(sizes[before:]) == list(shape) and all(size == 1 for size in sizes[:before])


def _keeps(move: ir.Node, shape: Sequence[object]) -> bool:
    """Whether a node leaves the normalized axes' elements in their order."""
    before, after = (v.shape if v is not None else None for v in (move.inputs[0], move.outputs[0]))
    if before is None or after is None:
        return False
    if move.op_type in ("Expand", "Identity"):
        return _ends_in(list(before), shape)
    counts = [_count(sizes) for sizes in (list(before), list(after), shape)]
    return None not in counts and len(set(counts)) == 1


def _count(sizes: Collection[object]) -> int | None:
    static = [size for size in sizes if isinstance(size, int)]
    return math.prod(static) if len(static) == len(sizes) else None


def _is_weight(value: ir.Value, rank: int, depth: int = _DEPTH) -> bool:
    """Whether a value is made of constants, and of inputs that have no axis of samples."""
    if ir.convenience.get_const_tensor(value) is not None:
        return True
    node = value.producer()
    if node is None:  # an input, of a function perhaps
        return value.shape is not None and len(value.shape) <= rank
    if not depth or node.domain:
        return False
    data = node.inputs[:1] if node.op_type in _MOVES else node.inputs if node.op_type in _ARITHMETIC else ()
    return bool(data) and all(v is not None and _is_weight(v, rank, depth - 1) for v in data)
