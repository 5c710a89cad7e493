"""Whether a value is another one with its channels turned in pairs, as RoPE does (Su et al. 2021, arXiv:2104.09864).

    y₂ᵢ = x₂ᵢ·cᵢ − x₂ᵢ₊₁·sᵢ        y₂ᵢ₊₁ = x₂ᵢ₊₁·cᵢ + x₂ᵢ·sᵢ        pairs of neighbours
    yᵢ  = xᵢ·cᵢ − xᵢ₊ₕ·sᵢ          yᵢ₊ₕ  = xᵢ₊ₕ·cᵢ + xᵢ·sᵢ          pairs over both halves, h = D/2

It is read off the channels themselves, so it does not matter how a graph comes by them. What c and s are called does
not matter either: the formula is the same for any two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.fuse.rotary.channel_reader import Reader
from mmdit_deploy.graph.fuse.rotary.channels import Channels, Dim, Made, Term

# Where channels go without being changed, but in sign and type.
_MOVES = frozenset("Cast Concat Gather Identity Neg Reshape Slice Split Squeeze Transpose Unsqueeze".split())
_FARTHEST = 12  # moves between what is turned and its products
_MOST_TRIED = 8
_MOST_MOVES = 200
_FINER = {
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}
_AXES = 4  # two of B, N, H in either order, and D


@dataclass(frozen=True)
class Part:
    """Some channels of a value: all, or a slice of them, or those at one place of the axes after the first.

    Args:
        value: with the same axes for samples and tokens as the angles, and perhaps others of size 1.
        axes: before its channels.
        cut: begin, end, step.
        at: positions on the axes after the first.
    """

    value: ir.Value
    axes: tuple[Dim, ...]
    cut: tuple[int, int, int] | None = None
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rotation:
    """What RoPE needs to know.

    Args:
        x: [B, N, H, D] or [B, H, N, D].
        dtype: in which it is turned.
        interleaved: pairs are neighbours, and not over both halves.
        heads_last: [B, N, H, D].
        angles: the axes of cosine and sine that are not 1: tokens, or samples and tokens.
        cos, sin: [N, D/2] or [B, N, D/2].
    """

    x: ir.Value
    dtype: ir.DataType
    interleaved: bool
    heads_last: bool
    angles: tuple[Dim, ...]
    cos: Part
    sin: Part


@dataclass(frozen=True)
class NotExact:
    """Something like a rotation, and why it is none."""

    reason: str
    value: ir.Value


@dataclass(frozen=True)
class _Product:
    """sign · channel of x · factor.

    Args:
        channel: None where it is of something else.
        axes: of the factor, before its channels.
    """

    sign: int
    channel: int | None
    factor: Term
    axes: tuple[Dim, ...]


class _Miss(Exception):
    """Why it is no rotation."""


def rotation(out: ir.Value) -> Rotation | NotExact | None:
    """What a value is a rotation of; None where it is nothing like one."""
    products = _products(out)
    if products is None:
        return None
    missed: NotExact | None = None
    last = out.producer()
    is_sum = last is not None and last.op_type in ("Add", "Sub")
    for x in _candidates(products)[:_MOST_TRIED]:
        if not _may_be_alike(x, out):
            continue
        for grid_axes in (1, 2, 3):
            reader = Reader(x, grid_axes)
            if is_sum and not _is_moved(x, reader, products):
                break
            try:
                found = _rotation_of(x, out, reader, products)
            except _Miss as miss:
                missed = missed or NotExact(str(miss), x)
                continue
            if found is not None:
                return found
    return missed


def _products(out: ir.Value) -> list[ir.Node] | None:
    """The products whose sums it consists of; None where it consists of anything else."""
    found: dict[ir.Node, None] = {}
    todo, steps = [out], 0
    while todo:
        steps += 1
        node = todo.pop().producer()
        if node is None or steps > _FARTHEST:
            return None
        if node.op_type == "Mul":
            found[node] = None
        elif node.op_type in ("Add", "Sub", "Concat"):
            todo += [i for i in node.inputs if i is not None]
        elif node.op_type in ("Reshape", "Unsqueeze") and node.inputs[0] is not None:
            todo.append(node.inputs[0])
        else:
            return None
    return list(found) if len(found) > 1 else None


def moved_from(value: ir.Value) -> Iterator[tuple[ir.Value, int]]:
    """A value and those that its channels were moved from, nearest first, each with its distance."""
    seen = {value}
    ring = [value]
    for distance in range(_FARTHEST):
        yield from ((v, distance) for v in ring)
        nodes = [n for v in ring if (n := v.producer()) is not None and n.op_type in _MOVES]
        sources = [i for n in nodes for i in (n.inputs if n.op_type == "Concat" else n.inputs[:1]) if i is not None]
        ring = [v for v in dict.fromkeys(sources) if v not in seen][:_MOST_MOVES]
        seen.update(ring)


def _candidates(products: Sequence[ir.Node]) -> list[ir.Value]:
    """What may be turned: that of which most products are, and the nearest of those."""
    reached: dict[ir.Value, dict[ir.Node, int]] = {}
    for node in products:
        for factor in node.inputs:
            for value, distance in moved_from(factor) if factor is not None else ():
                nearest = reached.setdefault(value, {})
                nearest[node] = min(distance, nearest.get(node, distance))
    fit = {value: by for value, by in reached.items() if value.shape is not None and len(value.shape) == _AXES}
    return sorted(fit, key=lambda value: (-len(fit[value]), sum(fit[value].values())))


def _may_be_alike(x: ir.Value, out: ir.Value) -> bool:
    """Whether both have as many channels; it saves reading those of every sum of products."""
    if x.shape is None or out.shape is None:
        return True
    return len(x.shape) == len(out.shape) and x.shape[-1] == out.shape[-1]


def _is_moved(x: ir.Value, reader: Reader, products: Sequence[ir.Node]) -> bool:
    """Whether a channel of x meets a factor at another place than its own. Factors take longer to read."""
    whole = reader.read(x)
    for factor in (i for node in products for i in node.inputs if i is not None):
        if any(value is x for value, _ in moved_from(factor)):
            channels = reader.read(factor)
            if whole is None or channels is None or [_uncast(t) for t in channels.grid.flat] != list(whole.grid):
                return True
    return False


def _rotation_of(x: ir.Value, out: ir.Value, reader: Reader, nodes: Sequence[ir.Node]) -> Rotation | None:
    before, after = reader.read(x), reader.read(out)
    if before is None or after is None or len(after.axes) != len(before.axes):
        return None
    width = before.grid.size
    if after.grid.shape != (width,) or width % 2:
        return None
    try:
        sums = [_sum(term, x, before.axes) for term in after.grid]
    except _NotASum:
        return None
    if all(p.channel in (None, j) for j, of in enumerate(sums) for p in of):
        return None  # nothing is turned: a product by channel
    interleaved, cos, sin = _pairs(sums)
    axes = {p.axes for of in sums for p in of}
    if len({tuple(size != 1 for size in a) for a in axes}) > 1:
        raise _Miss("its cosines and sines are of other axes")
    heads_last, angles = _layout(next(iter(axes)), before.axes)
    dtype = nodes[0].outputs[0].dtype or x.dtype
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise _Miss(f"it is turned in {dtype}, which RotaryEmbedding does not take")
    parts = [_part(terms, angles, reader, nodes) for terms in (cos, sin)]
    if parts[0] is None or parts[1] is None:
        raise _Miss("its cosines or sines lie nowhere together")
    return Rotation(x, dtype, interleaved, heads_last, angles, parts[0], parts[1])


class _NotASum(Exception):
    """A channel is no sum of products."""


def _sum(term: Term, x: ir.Value, axes: tuple[Dim, ...], sign: int = 1) -> list[_Product]:
    """A channel as a sum of products with x."""
    match term:
        case Made("Neg", (inner,)):
            return _sum(inner, x, axes, -sign)
        case Made("Add" | "Sub" as op, (a, b)):
            return _sum(a, x, axes, sign) + _sum(b, x, axes, sign if op == "Add" else -sign)
        case Made("Mul", (a, b), (of_a, of_b)):
            found = _product(a, of_a, b, of_b, x, axes) or _product(b, of_b, a, of_a, x, axes)
            return [replace(found, sign=found.sign * sign) if found else _Product(sign, None, None, ())]
    raise _NotASum


def _product(
    data: Term,
    data_axes: tuple[Dim, ...],
    factor: Term,
    factor_axes: tuple[Dim, ...],
    x: ir.Value,
    axes: tuple[Dim, ...],
) -> _Product | None:
    if data_axes != axes or len(factor_axes) > len(axes):
        return None
    data_sign, data = _unsigned(data)
    factor_sign, factor = _unsigned(factor)
    match _uncast(data):
        case Made("in", (), (value, int(channel))) if value is x:
            ones = (1,) * (len(axes) - len(factor_axes))
            return _Product(data_sign * factor_sign, channel, factor, ones + factor_axes)
    return None


def _unsigned(term: Term) -> tuple[int, Term]:
    match term:
        case Made("Neg", (inner,)):
            return -1, inner
    return 1, term


def _uncast(term: Term) -> Term:
    """Without casts to a finer type, which change nothing."""
    match term:
        case Made("Cast", (inner,), (before, after)) if after in _FINER.get(before, ()):
            return _uncast(inner)
    return term


def _pairs(sums: Sequence[Sequence[_Product]]) -> tuple[bool, list[Term], list[Term]]:
    """Whether pairs are neighbours, and the cosine and sine of each.

    Raises:
        _Miss: they are no rotation.
    """
    if any(len(of) != 2 or any(p.channel is None for p in of) for of in sums):
        raise _Miss("not every channel is the sum of two products with its channels")
    width = len(sums)
    for interleaved in (True, False):
        step = 1 if interleaved else width // 2
        first = range(0, width, 2) if interleaved else range(width // 2)
        if all({p.channel for p in sums[j]} == {i, i + step} for i in first for j in (i, i + step)):
            break
    else:
        raise _Miss("its pairs are neither neighbours nor over both halves")
    cos, sin = [], []
    for i in first:
        a, b = ({p.channel: p for p in sums[j]} for j in (i, i + step))
        signs = a[i].sign, a[i + step].sign, b[i + step].sign, b[i].sign
        if signs != (1, -1, 1, 1):
            other_way = signs == (1, 1, 1, -1)
            raise _Miss("it is turned the other way" if other_way else "its signs are not those of a rotation")
        if a[i].factor != b[i + step].factor or a[i + step].factor != b[i].factor:
            raise _Miss("both channels of a pair are not shown to have one cosine and one sine")
        cos.append(a[i].factor)
        sin.append(a[i + step].factor)
    return interleaved, cos, sin


def _layout(factor: tuple[Dim, ...], x: tuple[Dim, ...]) -> tuple[bool, tuple[Dim, ...]]:
    """Whether heads come after tokens, and the axes of the angles: tokens, or samples and tokens."""
    _, one, other = factor
    if one != 1 and other != 1:
        raise _Miss("its angles differ between heads")
    if one == other:
        raise _Miss("its angles are the same for every token")
    for size, of_x in zip(factor, x, strict=True):
        if size not in (1, of_x):  # of two names one may be 1, and broadcast: x too, which the op does not
            raise _Miss("its angles are for other tokens, or other samples")
    return other == 1, tuple(size for size in factor if size != 1)


def _part(wanted: list[Term], angles: tuple[Dim, ...], reader: Reader, nodes: Sequence[ir.Node]) -> Part | None:
    """Where the terms lie together: as far back as they do, and whole rather than in slices."""
    found: list[tuple[bool, int, Part]] = []
    for factor in dict.fromkeys(i for node in nodes for i in node.inputs if i is not None):
        for value, distance in moved_from(factor):
            channels = reader.read(value)
            if channels is None or tuple(size for size in channels.axes if size != 1) != angles:
                continue
            part = _cut(wanted, value, channels)
            if part is not None:
                found.append((part.cut is None and not part.at, distance, part))
    return max(found, key=lambda of: of[:2])[2] if found else None


def _cut(wanted: list[Term], value: ir.Value, channels: Channels) -> Part | None:
    count, terms = len(wanted), channels.grid
    if terms.ndim == 1:
        if list(terms) == wanted:
            return Part(value, channels.axes)
        cuts = [(0, 2 * count, 2), (1, 2 * count, 2), (0, count, 1), (count, 2 * count, 1)]
        fits = [cut for cut in cuts if len(terms) == 2 * count and list(terms[slice(*cut)]) == wanted]
        return Part(value, channels.axes, cut=fits[0]) if fits else None
    if terms.ndim == 0 or terms.shape[0] != count:
        return None
    places = [at for at in np.ndindex(terms.shape[1:]) if list(terms[(slice(None), *at)]) == wanted]
    return Part(value, channels.axes, at=places[0]) if places else None
