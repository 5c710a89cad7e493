"""What the channels of a value are, read off a graph without running it.

    x ─ Reshape(…, D/2, 2) ─ Slice ─ Neg ─ Concat ─ Reshape(…, D)   ⇒   [−x₁, x₀, −x₃, x₂, …]

Exporters move channels about in many ways that come to the same. The last axes of a value are written down here as a
grid of terms, one per channel; equal terms are equal numbers, for every token of every sample. The axes before them
(batch, tokens, heads) are only followed by their sizes.

Whoever sent the graph chose it: what would grow large is not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

Dim = Any  # of an axis: its size, its symbol, or (value, axis) where nothing is known
Term = Any  # of a channel: a number, the size of an axis, or a `Made`
_TO_THE_END = 2**31 - 1
MOST = 4096  # channels
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, eq=False)
class Made:
    """A channel that is made from others. `Reader` keeps one of each, so equal ones are the same object.

    Args:
        op: ``Cos``; ``in`` for a channel of a value that is read no further.
        of: what it is made from.
        about: all else that it depends on: of a product, the axes of both, which say how they meet.
    """

    op: str
    of: tuple[Term, ...] = ()
    about: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Channels:
    """A value, by its channels.

    Args:
        axes: those before the channels.
        grid: a term per channel, over the last axes; of a vector of sizes, over its only one.
    """

    axes: tuple[Dim, ...]
    grid: np.ndarray

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Of all axes."""
        return (*self.axes, *self.grid.shape)

    @property
    def numbers(self) -> list[int] | None:
        """Of a constant of integers."""
        flat = list(self.grid.flat)
        return flat if not self.axes and all(isinstance(n, int) for n in flat) else None


def grid(terms: Sequence[Term], shape: Sequence[int]) -> np.ndarray:
    """Terms in a grid; tuples stay tuples."""
    made = np.empty(len(terms), dtype=object)
    for i, term in enumerate(terms):  # one by one: a size may be a tuple, and tuples would be taken for a matrix
        made[i] = term
    return made.reshape(tuple(shape))


def dim(value: ir.Value, axis: int) -> Dim:
    """The size of a value's axis."""
    size = value.shape[axis] if value.shape is not None else None
    known = size.value if isinstance(size, ir.SymbolicDim) else size
    return (value, axis) if known is None else known


def _each(data: Channels, of: Callable[[Term], Term]) -> Channels:
    """What changes no sign, done to each channel: signs stay outside."""

    def signed(term: Term) -> Term:
        negative = isinstance(term, Made) and term.op == "Neg"
        return Made("Neg", (of(term.of[0]),)) if negative else of(term)

    return Channels(data.axes, grid([signed(term) for term in data.grid.flat], data.grid.shape))


def _unlike(data: Channels, value: ir.Value) -> Channels | None:
    """The same channels of other tokens: a value whose axes before the channels were cut, joined or looked up."""
    if value.shape is None or len(value.shape) < data.grid.ndim:
        return None
    axes = tuple(dim(value, i) for i in range(len(value.shape) - data.grid.ndim))
    return Channels(axes, _each(data, lambda term: Made("elsewhere", (term,), (value,))).grid)


def _deeper(data: Channels, count: int) -> Channels | None:
    """With so many axes in the grid: axes of size 1 may count as either kind."""
    more = max(count - data.grid.ndim, 0)
    kept = max(len(data.axes) - more, 0)
    if any(size != 1 for size in data.axes[kept:]):
        return None
    return Channels(data.axes[:kept], data.grid.reshape((1,) * more + data.grid.shape))


def _as_deep(inputs: Sequence[Channels], count: int = 0) -> list[Channels] | None:
    count = max(count, *(data.grid.ndim for data in inputs))
    made = [_deeper(data, count) for data in inputs]
    return [data for data in made if data is not None] if None not in made else None


def _meet(axes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The axes of what broadcasts."""
    rank = max(map(len, axes))
    padded = [(1,) * (rank - len(a)) + a for a in axes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _identity(node: ir.Node, value: ir.Value, data: Channels) -> Channels:
    return data


def _unary(node: ir.Node, value: ir.Value, data: Channels) -> Channels:
    return Channels(data.axes, grid([Made(node.op_type, (term,)) for term in data.grid.flat], data.grid.shape))


def _neg(node: ir.Node, value: ir.Value, data: Channels) -> Channels:
    def negative(term: Term) -> Term:
        if isinstance(term, int):
            return -term
        return term.of[0] if isinstance(term, Made) and term.op == "Neg" else Made("Neg", (term,))

    return Channels(data.axes, grid([negative(term) for term in data.grid.flat], data.grid.shape))


def _cast(node: ir.Node, value: ir.Value, data: Channels) -> Channels | None:
    before, after = node.inputs[0].dtype if node.inputs[0] else None, ir.DataType(node.attributes.get_int("to"))
    if before == after or (data.numbers is not None and after.is_integer()):
        return data
    if data.numbers is not None and len(data.grid) > 1:
        return None  # positions, one for each token, and no sizes
    return _each(data, lambda term: Made("Cast", (term,), (before, after)))


_ON_NUMBERS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a // b if b else 0,
    "Mod": lambda a, b: a % b if b else 0,
}


def _binary(node: ir.Node, value: ir.Value, a: Channels, b: Channels) -> Channels | None:
    even = _as_deep((a, b))
    if even is None:
        return None
    a, b = even
    if math.prod(np.broadcast_shapes(a.grid.shape, b.grid.shape)) > MOST:
        return None
    grids = np.broadcast_arrays(a.grid, b.grid)
    on_numbers = _ON_NUMBERS.get(node.op_type)

    def term(x: Term, y: Term) -> Term:
        if on_numbers and isinstance(x, int) and isinstance(y, int) and (number := on_numbers(x, y)) in _INT64:
            return number
        return Made(node.op_type, (x, y), (a.axes, b.axes))

    terms = [term(x, y) for x, y in zip(grids[0].flat, grids[1].flat, strict=True)]
    return Channels(_meet((a.axes, b.axes)), grid(terms, grids[0].shape))


def _reshape(node: ir.Node, value: ir.Value, data: Channels, shape: Channels) -> Channels | None:
    if shape.axes or shape.grid.ndim != 1:
        return None
    sizes: list[Dim] = list(shape.grid)
    if not node.attributes.get_int("allowzero", 0):
        sizes = [data.dims[i] if s == 0 and i < len(data.dims) else s for i, s in enumerate(sizes)]
    if value.shape is not None and len(value.shape) == len(sizes):
        # What was computed, such as the tokens of both streams, has its name there.
        sizes = [s if isinstance(s, int) else dim(value, i) for i, s in enumerate(sizes)]
    for count in range(1, len(sizes) + 1):
        fitted = _fit(data, sizes[:-count], sizes[-count:])
        if fitted is not None:
            return fitted
    return None


def _fit(data: Channels, before: Sequence[Dim], last: Sequence[Dim]) -> Channels | None:
    """The channels in other axes, where those before them stay, but for ones.

    No reshape changes how many elements there are: a single size that is not known follows from the others.
    """
    known = math.prod(size for size in last if isinstance(size, int) and size > 0)
    open_sizes = sum(not isinstance(size, int) or size < 0 for size in last)
    if known == 0 or data.grid.size % known or open_sizes > 1 or (not open_sizes and known != data.grid.size):
        return None
    kept = [size for size in data.axes if size != 1]
    if len(kept) != sum(size != 1 for size in before):
        return None
    if open_sizes + sum(a != b for a, b in zip(kept, (size for size in before if size != 1), strict=True)) > 1:
        return None
    names = iter(kept)
    axes = tuple(1 if size == 1 else next(names) for size in before)
    inner = [size if isinstance(size, int) and size > 0 else data.grid.size // known for size in last]
    return Channels(axes, data.grid.reshape(inner))


def _flatten(node: ir.Node, value: ir.Value, data: Channels) -> Channels | None:
    axis = node.attributes.get_int("axis", 1)
    return Channels(data.axes, data.grid.reshape(-1)) if axis == len(data.axes) == 1 else None


def _unsqueeze(node: ir.Node, value: ir.Value, data: Channels, axes: Channels) -> Channels | None:
    if axes.numbers is None:
        return None
    before, inner = list(data.axes), list(data.grid.shape)
    rank = len(before) + len(inner) + len(axes.numbers)
    for axis in sorted(a % rank for a in axes.numbers):
        # Between the two kinds it is of the first, but of a number, which has neither.
        if axis < len(before) or (axis == len(before) and inner):
            before.insert(axis, 1)
        else:
            inner.insert(axis - len(before), 1)
    return Channels(tuple(before), data.grid.reshape(inner))


def _squeeze(node: ir.Node, value: ir.Value, data: Channels, axes: Channels | None = None) -> Channels | None:
    if axes is None or axes.numbers is None:
        return None
    gone = {a % len(data.dims) for a in axes.numbers}
    if any(data.dims[a] != 1 for a in gone if a >= len(data.axes)):
        return None
    inner = [size for i, size in enumerate(data.grid.shape) if i + len(data.axes) not in gone]
    return Channels(tuple(a for i, a in enumerate(data.axes) if i not in gone), data.grid.reshape(inner))


def _slice(
    node: ir.Node,
    value: ir.Value,
    data: Channels,
    starts: Channels,
    ends: Channels,
    axes: Channels | None = None,
    steps: Channels | None = None,
) -> Channels | None:
    if starts.numbers is None or ends.numbers is None:
        return None
    count = len(starts.numbers)
    along = axes.numbers if axes is not None else list(range(count))
    by = steps.numbers if steps is not None else [1] * count
    if along is None or by is None:
        return None
    before = len(data.axes)
    cut = [slice(None)] * data.grid.ndim
    whole = True
    for start, end, axis, step in zip(starts.numbers, ends.numbers, along, by, strict=True):
        axis %= len(data.dims)
        if axis >= before:
            cut[axis - before] = slice(start, end, step)
        else:
            whole &= start == 0 and end >= _TO_THE_END and step == 1
    kept = Channels(data.axes, data.grid[tuple(cut)])
    return kept if whole else _unlike(kept, value)


def _split(node: ir.Node, value: ir.Value, data: Channels, sizes: Channels | None = None) -> Channels | None:
    axis = node.attributes.get_int("axis", 0) % len(data.dims) - len(data.axes)
    if axis < 0:
        return _unlike(data, value)
    count = len(node.outputs)
    part = -(-data.grid.shape[axis] // count)
    lengths = sizes.numbers if sizes is not None else [part] * count
    if lengths is None:
        return None
    index = node.outputs.index(value)
    begin = sum(lengths[:index])
    cut = [slice(None)] * data.grid.ndim
    cut[axis] = slice(begin, begin + lengths[index])
    return Channels(data.axes, data.grid[tuple(cut)])


def _gather(node: ir.Node, value: ir.Value, data: Channels, indices: Channels) -> Channels | None:
    axis = node.attributes.get_int("axis", 0) % len(data.dims) - len(data.axes)
    if axis < 0:
        return _unlike(data, value)
    if indices.numbers is None or any(not -data.grid.shape[axis] <= i < data.grid.shape[axis] for i in indices.numbers):
        return None
    if data.grid.size * len(indices.numbers) > MOST * data.grid.shape[axis]:
        return None
    chosen = np.array(indices.numbers, dtype=np.int64).reshape(indices.grid.shape)
    taken = np.take(data.grid, chosen, axis=axis)
    return Channels(data.axes, taken if isinstance(taken, np.ndarray) else grid([taken], ()))


def _gather_nd(node: ir.Node, value: ir.Value, data: Channels, indices: Channels) -> Channels | None:
    places = node.inputs[1].shape if node.inputs[1] is not None else None
    if places is None or not isinstance(places[-1], int) or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    return _unlike(data, value) if places[-1] <= len(data.axes) else None


def _concat(node: ir.Node, value: ir.Value, *inputs: Channels) -> Channels | None:
    rank = len(inputs[0].dims)
    axis = node.attributes.get_int("axis") % rank if rank else 0
    if any(len(data.dims) != rank for data in inputs) or sum(data.grid.size for data in inputs) > MOST:
        return None
    inner = _as_deep(inputs, rank - axis)
    if inner is not None:
        grids = [data.grid for data in inner]
        at = axis - rank + grids[0].ndim
        return Channels(inner[0].axes, np.concatenate(grids, axis=at))
    even = _as_deep(inputs)
    if even is None or len({data.grid.shape for data in even}) > 1:
        return None
    joined = [Made("joined", terms) for terms in zip(*(data.grid.flat for data in even), strict=True)]
    return _unlike(Channels(even[0].axes, grid(joined, even[0].grid.shape)), value)


def _expand(node: ir.Node, value: ir.Value, data: Channels, shape: Channels) -> Channels | None:
    if shape.axes or shape.grid.ndim != 1:
        return None
    sizes: list[Dim] = list(shape.grid)
    inner, before = sizes[-data.grid.ndim :], sizes[: -data.grid.ndim]
    inner = [1] * (data.grid.ndim - len(inner)) + inner
    if not data.grid.ndim or not all(isinstance(size, int) for size in inner):
        return None
    whole = np.broadcast_shapes(data.grid.shape, tuple(inner))
    if math.prod(whole) > MOST:
        return None
    return Channels(_meet((data.axes, tuple(before))), np.broadcast_to(data.grid, whole))


def _tile(node: ir.Node, value: ir.Value, data: Channels, repeats: Channels) -> Channels | None:
    times = repeats.numbers
    if times is None or len(times) != len(data.dims) or any(n != 1 for n in times[: len(data.axes)]):
        return None
    if not 0 < math.prod(times) * data.grid.size <= MOST:
        return None
    return Channels(data.axes, np.tile(data.grid, times[len(data.axes) :]))


def _transpose(node: ir.Node, value: ir.Value, data: Channels) -> Channels | None:
    before = len(data.axes)
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(data.dims))[::-1]
    if any(p >= before for p in perm[:before]):
        return None
    turned = Channels(data.axes, data.grid.transpose([p - before for p in perm[before:]]))
    return turned if list(perm[:before]) == list(range(before)) else _unlike(turned, value)


# What each op makes of its inputs' channels; None where that is not known.
READ: dict[str, Callable[..., Channels | None]] = {
    **dict.fromkeys(("Cos", "Exp", "Reciprocal", "Sin", "Sqrt"), _unary),
    **dict.fromkeys(("Add", "Div", "Mod", "Mul", "Pow", "Sub"), _binary),
    "Cast": _cast,
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "Neg": _neg,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
