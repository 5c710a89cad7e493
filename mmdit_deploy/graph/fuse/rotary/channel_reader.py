"""Reads the channels of values, from one value on."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.fuse.rotary.channel_rows import is_turned, rows
from mmdit_deploy.graph.fuse.rotary.channels import READ, Channels, Made, Term, dim, grid

_WIDEST = 1024  # channels: of a head, and not of the model
_DEEPEST = 40  # ops: what makes cosines out of positions, and not the layers before
_LARGEST = 2**20  # elements of a constant that is looked at: a table of angles, and not a weight
_UNREAD = Channels((None,), grid([], (0,)))


class Reader:
    """What the channels of values are, in terms of those of one value `x` and of what is read no further.

    Args:
        x: a value whose last axis is its channels.
        grid_axes: how many of the last axes are channels, of a value that is read no further: 2 where cosine and sine
            of an angle lie beside each other, 3 where its rotation matrix does.
    """

    def __init__(self, x: ir.Value, grid_axes: int = 1):
        self._x = x
        self._grid_axes = grid_axes
        self._known: dict[ir.Value, Channels | None] = {}
        self._terms: dict[tuple[object, ...], Made] = {}
        self._kept: set[int] = set()  # the ids of those terms
        self._depth = 0

    def read(self, value: ir.Value) -> Channels | None:
        """A value's channels; None where its shape is not known, or has too many of them."""
        if value not in self._known:
            read = self._read(value)
            if read is not None:
                read = Channels(read.axes, grid([self._same(term) for term in read.grid.flat], read.grid.shape))
            self._known[value] = read
        return self._known[value]

    def _same(self, term: Term) -> Term:
        """The one term that is kept of all that equal it: they are compared, and may be as deep as a graph."""
        if not isinstance(term, Made) or id(term) in self._kept:
            return term
        of = tuple(self._same(part) for part in term.of)
        key = (term.op, *((id(part),) if isinstance(part, Made) else part for part in of), term.about)
        if key not in self._terms:
            self._terms[key] = kept = Made(term.op, of, term.about)
            self._kept.add(id(kept))
        return self._terms[key]

    def _read(self, value: ir.Value) -> Channels | None:
        if value is self._x:
            return _source(value, 1)
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return _constant(tensor, self._grid_axes) or _source(value, self._grid_axes)
        node = value.producer()
        found = None
        if node is not None and node.domain == "" and given_by_call(node) is None and self._depth < _DEEPEST:
            self._depth += 1
            found = _sizes(self, node) if node.op_type == "Shape" else self._made(node, value)
            self._depth -= 1
        return found or _source(value, self._grid_axes)

    def _made(self, node: ir.Node, value: ir.Value) -> Channels | None:
        if node.op_type not in READ:
            return None
        if is_turned(node):
            return rows(node.inputs[0], self.read)
        inputs = [None if i is None else self.read(i) for i in node.inputs]
        unread = [i for i, read in zip(node.inputs, inputs, strict=True) if i is not None and read is None]
        if unread and node.op_type == "Mul":
            inputs = _as_wide(node, inputs)
        elif unread and node.op_type in ("Gather", "GatherND") and inputs[0] is not None:
            inputs[1] = _UNREAD  # where something is looked up may come from anywhere
        elif unread:
            return None
        try:
            return READ[node.op_type](node, value, *inputs) if inputs else None
        except (ValueError, IndexError):  # shapes that do not go together: somebody's broken graph
            return None


def _as_wide(node: ir.Node, inputs: list[Channels | None]) -> list[Channels | None]:
    """A factor whose width is not known has that of the other, or its one channel broadcasts."""
    read = [data for data in inputs if data is not None]
    if len(read) != 1 or read[0].grid.ndim != 1 or read[0].grid.size == 1:
        return []
    made: list[Channels | None] = []
    for value, data in zip(node.inputs, inputs, strict=True):
        if data is None and (value is None or value.shape is None or not len(value.shape)):
            return []
        if data is None and value is not None and value.shape is not None:
            axes = tuple(dim(value, i) for i in range(len(value.shape) - 1))
            terms = [Made("in", (), (value, i)) for i in range(read[0].grid.size)]
            data = Channels(axes, grid(terms, read[0].grid.shape))
        made.append(data)
    return made


def _source(value: ir.Value, grid_axes: int) -> Channels | None:
    """A value that is read no further."""
    if value.shape is None:
        return None
    before = max(len(value.shape) - grid_axes, 0)
    inner = [size for size in value.shape[before:] if isinstance(size, int)]
    count = math.prod(inner)
    if len(inner) < len(value.shape) - before or not 0 < count <= _WIDEST:
        return None
    axes = tuple(dim(value, i) for i in range(before))
    return Channels(axes, grid([Made("in", (), (value, i)) for i in range(count)], inner))


def _constant(tensor: ir.TensorProtocol, grid_axes: int) -> Channels | None:
    """Equal channels of a constant are equal terms; those of a vector of integers are numbers."""
    if tensor.size > _LARGEST:
        return None
    try:
        array = tensor.numpy()
    except OSError:  # it lies in a file that is not there, or not yet
        return None
    if tensor.dtype.is_integer() and array.ndim <= 1 and array.size <= _WIDEST:
        return Channels((), grid([int(n) for n in array.flat], array.shape))
    before = max(array.ndim - grid_axes, 0)
    inner = array.shape[before:]
    if not 0 < math.prod(inner) <= _WIDEST:
        return None
    columns = np.ascontiguousarray(array.reshape(-1, math.prod(inner)).T)
    terms = [Made("constant", (), (tensor.dtype, column.tobytes())) for column in columns]
    return Channels(array.shape[:before], grid(terms, inner))


def _sizes(reader: Reader, node: ir.Node) -> Channels | None:
    """What a Shape gives."""
    value = node.inputs[0]
    if value is None:
        return None
    dims = [dim(value, i) for i in range(len(value.shape))] if value.shape is not None else [None]
    if not all(isinstance(size, int | str) for size in dims):
        data = reader.read(value)
        if data is None:
            return None
        dims = list(data.dims)
    chosen = dims[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(dims))]
    return Channels((), grid(chosen, (len(chosen),)))
