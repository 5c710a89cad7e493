"""How many elements each kernel reads and writes at the opt shape of its profile, and how many FLOPs it does.

A layer list says neither: where an axis is dynamic its dims are −1, and axes are merged, split and swapped:

    blocks.3: node_linear reads [2, 4096, 1536]        (the graph, at the opt sizes)
    kernel made of blocks.3: node_linear reads [-1, 1536]   ⇒   8192 × 1536 elements

*Measured* is which kernels there are, which tensors each reads and writes, their static dims and their types.
*Derived* is the size of what is −1: a tensor holds a value of the nodes that its kernel was made of, or what such a
node is known to compute on its way (a norm's means, an attention's heads and scores), its axes merged and swapped, but
none of its static axes cut. Of the values that fit, the one is taken that fits at both ends, where it is written and
wherever it is read; and of several, the one that no other tensor of its kernel holds. Where several are left, or none,
the size is unknown. Checked against engines of one static shape, whose lists have no −1. Padding that TensorRT adds by
itself is not seen (fp32 attention pads its keys to fours).

FLOPs are those of the products among the nodes that a kernel was made of, a multiply-add as two, and no others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from mmdit_deploy.build.layers import EngineLayer, LayerTensor
from mmdit_deploy.build.node_shapes import (
    Dim,
    ExecutedNode,
    Shape,
    Source,
    Value,
    elements_of,
    executed_nodes,
    shape_of,
)
from mmdit_deploy.contract import Profile

# what TensorRT adds to the name of an ONNX value
_NAME = re.compile(r"( \[profile \d+\])?(\.\d+)?(_\d+)?(_myl\d+)?$")
_PARTS = frozenset({"Slice", "Split"})  # ops that read a part of what they are given
_PRODUCTS = frozenset({"MatMul", "Gemm", "Attention"})


def at_opt(
    layers: Sequence[EngineLayer], graph: onnx.ModelProto, profiles: Sequence[Profile]
) -> tuple[EngineLayer, ...]:
    """The layers, with the elements of their tensors and their FLOPs at the opt shape of their profile.

    Args:
        layers: of the engine, those of all profiles.
        graph: the model that the builder was given.
        profiles: the engine's.

    Returns:
        The same layers. Of what is no kernel, and where it cannot be known, `elements` and `flops` stay None.
    """
    made = list(layers)
    for number, profile in enumerate(profiles):
        sizes = {axis: sizes.opt for axis, sizes in profile.items()}
        nodes = executed_nodes(graph, sizes)
        ends = {v.name: shape for v in [*graph.graph.input, *graph.graph.output] if (shape := shape_of(v, sizes))}
        places = [i for i, layer in enumerate(layers) if layer.is_kernel and layer.profile == number]
        for i, kernel in zip(places, _Plan([layers[i] for i in places], nodes, ends).sized(), strict=True):
            made[i] = kernel
    return tuple(made)


@dataclass(eq=False)
class _Use:
    """One kernel's reading or writing of a tensor.

    Args:
        fits: how many elements it may have, and how well: from `_likeness`; empty where nothing fits.
        totals: elements of every value of its kernel's nodes, whether it fits or not.
        elements: how many it has.
    """

    tensor: LayerTensor
    written: bool
    fits: Mapping[int, int]
    totals: frozenset[int]
    elements: int | None = None

    @property
    def static(self) -> int:
        return math.prod(n for n in self.tensor.dims if n >= 0)

    @property
    def dynamic(self) -> tuple[bool, ...]:
        return tuple(n < 0 for n in self.tensor.dims)


class _Plan:
    """The kernels of one profile."""

    def __init__(self, kernels: Sequence[EngineLayer], nodes: Mapping[Source, ExecutedNode], ends: Mapping[str, Shape]):
        self.kernels, self.ends = kernels, ends
        self.nodes = [[nodes[s] for s in dict.fromkeys(kernel.sources) if s in nodes] for kernel in kernels]
        self.inputs: list[list[_Use]] = []
        self.outputs: list[list[_Use]] = []
        self.uses: dict[str, list[_Use]] = defaultdict(list)
        for kernel, made_of in zip(kernels, self.nodes, strict=True):
            shapes = list(dict.fromkeys(itertools.chain.from_iterable(map(_shapes_in, made_of))))
            self.inputs.append([self._use(t, shapes, written=False) for t in kernel.inputs])
            self.outputs.append([self._use(t, shapes, written=True) for t in kernel.outputs])

    def _use(self, tensor: LayerTensor, shapes: Sequence[Shape], *, written: bool) -> _Use:
        totals = frozenset(map(elements_of, shapes))
        end = self.ends.get(tensor.name) or self.ends.get(_NAME.sub("", tensor.name))
        if -1 not in tensor.dims:
            use = _Use(tensor, written, {}, totals, math.prod(tensor.dims))
        elif end is not None and _fits(tensor.dims, end):
            use = _Use(tensor, written, {elements_of(end): _LIKEST}, totals, elements_of(end))
        else:
            fits: dict[int, int] = {}
            for shape in shapes:
                if _fits(tensor.dims, shape):
                    total = elements_of(shape)
                    fits[total] = max(fits.get(total, 0), _likeness(tensor.dims, shape))
            use = _Use(tensor, written, fits, totals)
        self.uses[tensor.name].append(use)
        return use

    def sized(self) -> Iterator[EngineLayer]:
        for name, uses in self.uses.items():
            for alike in _grouped(uses):
                self._agree(name, alike)
        everywhere = range(len(self.kernels))
        while (
            any([self._follow(uses) for uses in self.uses.values()])
            or any([self._rows(i) for i in everywhere])
            or any([self._last_left(i) for i in everywhere])
        ):
            pass
        flops = self._flops()
        for i, kernel in enumerate(self.kernels):
            read = self._read(i)
            yield dataclasses.replace(
                kernel,
                inputs=_with(kernel.inputs, read),
                outputs=_with(kernel.outputs, [use.elements for use in self.outputs[i]]),
                constants=None if kernel.constants is None else _constants(kernel.constants, self.nodes[i]),
                flops=flops[i],
            )

    def _agree(self, name: str, uses: Sequence[_Use]) -> None:
        """Size a tensor by what fits wherever it is used as a whole."""
        open_ = [use for use in uses if use.elements is None]
        known = {use.elements for use in uses if use.elements is not None}
        said = [set(use.fits) for use in uses if use.fits]
        common = known or (set.intersection(*said) if said else set())
        if not common:  # what reads a part along a dynamic axis says something else
            for use in open_:
                use.elements = _only(use.fits)
            return
        likeness = {total: sum(use.fits.get(total, 0) for use in uses) for total in common}
        best = max(likeness.values())
        chosen = _only([total for total in common if likeness[total] == best]) or self._by_name(name, common)
        for use in open_:
            use.elements = chosen

    def _by_name(self, name: str, among: set[int]) -> int | None:
        """The size of the value that the tensor is named after, where it is named after one that its kernel makes."""
        base = _NAME.sub("", name)
        found = {
            value.elements
            for kernel, made_of in zip(self.kernels, self.nodes, strict=True)
            if any(tensor.name == name for tensor in kernel.outputs)
            for node in made_of
            for value in node.outputs
            if re.fullmatch(rf"{re.escape(value.name)}(_\d+)?", base)  # numbered, where functions share the name
        }
        return _only([total for total in among if total in found])

    def _follow(self, uses: Sequence[_Use]) -> bool:
        """Size the uses of a tensor after another whose size is known.

        It is as large: where the kernel has a value of that size, though static axes are cut in it (heads), or has
        none that fits. Of columns there are as many rows.
        """
        changed = False
        for use, other in itertools.permutations(uses, 2):
            if use.elements is None and other.elements is not None:
                columns = use.dynamic == other.dynamic and use.static < other.static and other.written
                elements = other.elements * use.static // other.static if columns else other.elements
                among = use.fits or ({elements} if columns or use.static == other.static else use.totals)
                if elements in among and elements % use.static == 0:
                    use.elements, changed = elements, True
        return changed

    def _rows(self, i: int) -> bool:
        """A product with one weight [K, N] makes as many rows of N as it reads of K."""
        weights = [t.dims for t in self.kernels[i].constants or () if len(t.dims) == 2 and 1 not in t.dims]
        if not self.kernels[i].is_product or len(weights) != 1:
            return False
        k, n = weights[0]
        read = [use for use in self.inputs[i] if use.tensor.dims == (-1, k)]
        made = [use for use in self.outputs[i] if use.tensor.dims == (-1, n)]
        if len(read) != 1 or len(made) != 1 or (read[0].elements is None) == (made[0].elements is None):
            return False
        if read[0].elements is not None:
            made[0].elements = read[0].elements // k * n
        elif made[0].elements is not None:
            read[0].elements = made[0].elements // n * k
        return True

    def _last_left(self, i: int) -> bool:
        """Where a kernel reads as many tensors of one form as values that fit, the last tensor holds the last value."""
        made = {id(value) for node in self.nodes[i] for value in node.outputs}
        read = {id(v): v for node in self.nodes[i] for v in node.inputs if not v.weight and id(v) not in made}
        changed = False
        for dims in {use.tensor.dims for use in self.inputs[i] if use.elements is None}:
            uses = {use.tensor.name: use for use in self.inputs[i] if use.tensor.dims == dims}
            values = [v.elements for v in read.values() if v.shape is not None and _fits(dims, v.shape)]
            left = Counter(values) - Counter(use.elements for use in uses.values() if use.elements is not None)
            open_ = [use for use in uses.values() if use.elements is None]
            if len(values) == len(uses) and len(left) == 1 and left.total() == len(open_):
                for use in open_:
                    (use.elements,) = left
                    changed = True
        return changed

    def _read(self, i: int) -> list[int | None]:
        """Elements that a kernel reads; a whole tensor that it is given twice, once."""
        given: set[str] = set()
        read: list[int | None] = []
        for use in self.inputs[i]:
            name = use.tensor.name
            whole = use.elements == max((other.elements or 0 for other in self.uses[name]), default=0)
            read.append(0 if whole and name in given else _part_read(use, self.nodes[i]))
            given |= {name} if whole else set()
        return read

    def _flops(self) -> list[int | None]:
        """FLOPs of each kernel; a product that became several kernels is theirs in equal parts."""
        products = [self._products(i) for i in range(len(self.kernels))]
        shares = Counter(id(node) for made_of in products for node in made_of)
        found: list[int | None] = []
        for kernel, made_of in zip(self.kernels, products, strict=True):
            counts = [_node_flops(node) for node in made_of]
            if None in counts or (kernel.is_product and not counts):
                found.append(None)
            else:
                found.append(sum(n // shares[id(node)] for n, node in zip(counts, made_of, strict=True) if n))
        return found

    def _products(self, i: int) -> list[ExecutedNode]:
        kernel = self.kernels[i]
        if not (kernel.is_product or kernel.is_fused_attention):
            return []  # one that copies what a product reads or makes may name it, too
        made_of = [node for node in self.nodes[i] if node.op in _PRODUCTS]
        own = [node for node in made_of if node.op != "Attention"]
        return made_of if kernel.is_fused_attention or not own else own  # a projection may move Q for the attention


def _shapes_in(node: ExecutedNode) -> Iterator[Shape]:
    """What a node reads and makes, and what it is known to compute on its way."""
    for value in (*node.inputs, *node.outputs):
        if value.shape is not None and not value.weight:
            yield value.shape
    first = node.inputs[0].shape if node.inputs else None
    if first is None:
        return
    if node.op.endswith("Normalization") or node.op == "Softmax":
        axis = int(node.attributes.get("axis", -1)) % max(len(first), 1)
        yield tuple(Dim(1) if i >= axis else dim for i, dim in enumerate(first))
    elif node.op == "Attention":
        yield from _attention_shapes(node)
    elif node.op == "RotaryEmbedding":
        yield from _rotary_shapes(node, first)


def _attention_shapes(node: ExecutedNode) -> Iterator[Shape]:
    """Heads [B, T, H, D] of Q, K, V and the result, and the scores [B, H, T, T] with their sums."""
    heads = [_heads(value, int(node.attributes.get(name, 0))) for value, name in _attention_values(node)]
    yield from (shape for shape in heads if shape is not None)
    if heads[0] is not None and heads[1] is not None:
        batch, queries, h, _ = heads[0]
        yield batch, h, queries, heads[1][1]
        yield batch, h, queries, Dim(1)


def _attention_values(node: ExecutedNode) -> list[tuple[Value, str]]:
    q, k, v, *_ = node.inputs
    return [(q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads"), (node.outputs[0], "q_num_heads")]


def _heads(value: Value, heads: int) -> Shape | None:
    """[B, T, H, D] of [B, T, H·D], or of [B, H, T, D]."""
    shape = value.shape
    if shape is not None and len(shape) == 4:
        return shape[0], shape[2], shape[1], shape[3]
    if shape is None or len(shape) != 3 or not heads:
        return None
    return shape[0], shape[1], Dim(heads), Dim(shape[2].size // heads)


def _rotary_shapes(node: ExecutedNode, x: Shape) -> Iterator[Shape]:
    """Halves and pairs of heads [B, T, H, D]."""
    heads = _heads(node.inputs[0], int(node.attributes.get("num_heads", 0))) or x
    half = Dim(heads[-1].size // 2)
    yield heads
    yield *heads[:-1], half
    yield *heads[:-1], half, Dim(2)


def _fits(dims: Sequence[int], shape: Shape) -> bool:
    """Whether a tensor may hold a value with its axes merged and swapped, and none of its static ones cut.

    Each static dim is a product of static axes; each dynamic one has at least one of the dynamic axes, and takes
    whatever is left. A last dim of 1 is an axis that was summed over.
    """
    if len(dims) > 1 and dims[-1] == 1 and not (shape and shape[-1].size == 1):
        return False
    wanted = tuple(n for n in dims if n >= 0 and n != 1)
    open_ = sum(n < 0 for n in dims)
    static = tuple(dim.size for dim in shape if not dim.dynamic and dim.size != 1)
    dynamic = sum(dim.dynamic for dim in shape)
    if dynamic < open_ or (dynamic and not open_):
        return False
    return _divides(wanted, static, exactly=not open_)


def _divides(wanted: tuple[int, ...], static: tuple[int, ...], *, exactly: bool) -> bool:
    if not wanted:
        return not (exactly and static)
    for count in range(1, len(static) + 1):
        for taken in itertools.combinations(range(len(static)), count):
            if math.prod(static[i] for i in taken) == wanted[0]:
                left = tuple(size for i, size in enumerate(static) if i not in taken)
                if _divides(wanted[1:], left, exactly=exactly):
                    return True
    return False


_LIKEST = 2


def _likeness(dims: Sequence[int], shape: Shape) -> int:
    """2 for the very axes, 1 for the same with further axes of 1, 0 for others: merged or swapped.

    Rows [-1, 64] are what any axes merge into, so that they are like none.
    """
    if len(dims) < 3:
        return 0
    if _same_axes(dims, shape):
        return _LIKEST
    ones = [n for n in dims if n == 1], [dim for dim in shape if dim == Dim(1)]
    without = [n for n in dims if n != 1], [dim for dim in shape if dim != Dim(1)]
    return int(len(ones[0]) > len(ones[1]) and _same_axes(*without))


def _same_axes(dims: Sequence[int], shape: Sequence[Dim]) -> bool:
    return len(dims) == len(shape) and all(
        n < 0 if dim.dynamic else n == dim.size for n, dim in zip(dims, shape, strict=True)
    )


def _grouped(uses: Iterable[_Use]) -> list[list[_Use]]:
    """Uses by their static elements: those of one group may be of the whole tensor."""
    groups: dict[int, list[_Use]] = defaultdict(list)
    for use in uses:
        groups[use.static].append(use)
    return list(groups.values())


def _only(totals: Iterable[int]) -> int | None:
    found = set(totals)
    return found.pop() if len(found) == 1 else None


def _with(tensors: Sequence[LayerTensor], elements: Sequence[int | None]) -> tuple[LayerTensor, ...]:
    return tuple(dataclasses.replace(t, elements=n) for t, n in zip(tensors, elements, strict=True))


def _part_read(use: _Use, made_of: Sequence[ExecutedNode]) -> int | None:
    """Elements that a kernel reads of a tensor: fewer, where every node that reads it only takes a part of it."""
    if use.elements is None:
        return None
    made = {id(value) for node in made_of for value in node.outputs}
    readers = [
        node
        for node in made_of
        if any(id(value) not in made and value.elements == use.elements and not value.weight for value in node.inputs)
    ]
    if not readers or any(node.op not in _PARTS for node in readers):
        return use.elements
    read = {id(value) for node in made_of for value in node.inputs}
    parts = [value for node in readers for value in node.outputs]
    parts = [value for value in parts if id(value) in read] or parts
    taken = [value.elements for value in parts]
    return use.elements if None in taken else min(use.elements, sum(n for n in taken if n))


def _constants(constants: Sequence[LayerTensor], made_of: Sequence[ExecutedNode]) -> tuple[LayerTensor, ...]:
    """Constants are read whole, but for a table of which rows are gathered."""
    gathered = {
        node.inputs[0].elements: node.outputs[0].elements
        for node in made_of
        if node.op in ("Gather", "GatherND") and node.inputs[0].weight and node.outputs[0].elements is not None
    }
    whole = [None if -1 in t.dims else math.prod(t.dims) for t in constants]
    return _with(constants, [gathered.get(n, n) if n is not None else None for n in whole])


def _node_flops(node: ExecutedNode) -> int | None:
    """FLOPs of a product: 2·M·N·K, and 4·B·H·T²·D of an attention; None where the graph lacks a shape."""
    shapes = [value.shape for value in node.inputs]
    if node.op == "Attention":
        (q, k, v) = (_heads(value, int(node.attributes.get(name, 0))) for value, name in _attention_values(node)[:3])
        if q is None or k is None or v is None:
            return None
        return 2 * q[0].size * q[2].size * q[1].size * k[1].size * (q[3].size + v[3].size)
    a, b = shapes[0], shapes[1]
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    if node.op == "Gemm":
        m = a[1 if node.attributes.get("transA") else 0].size
        return 2 * m * elements_of(b)
    return 2 * elements_of(a) * b[-1].size
