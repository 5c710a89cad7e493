"""Every node that one run of a graph executes, with the shapes of what it reads and makes, at given sizes of the axes.

    blocks.3 (MMDiTJointBlock): node_MatMul_14   ⇒   reads [2, 4096, 1536] and a weight, makes [2, 4096, 4608]

A function's nodes count once per call, under the names that an engine's layer list gives them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from mmdit_deploy.contract.axes import axis_size

_ELEMENTWISE = frozenset({"Add", "Cast", "Clip", "Div", "Gelu", "Mul", "Neg", "Sigmoid", "Sub", "Tanh"})

Source = tuple[str, str]  # a node and the call that it is in, as `EngineLayer.sources` has them


@dataclass(frozen=True)
class Dim:
    """One axis of a value: its size, and whether the engine sees it as −1."""

    size: int
    dynamic: bool = False


Shape = tuple[Dim, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A value of one run: what a function's input or output stands for is one and the same value.

    Args:
        name: in the scope that it is of.
        shape: None where the graph does not say it.
        weight: it is an initializer.
    """

    name: str
    shape: Shape | None
    weight: bool = False

    @property
    def elements(self) -> int | None:
        return None if self.shape is None else elements_of(self.shape)


@dataclass(frozen=True, eq=False)
class ExecutedNode:
    """A node, once for each time that it is executed."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, Any]


def elements_of(shape: Shape) -> int:
    return math.prod(dim.size for dim in shape)


def executed_nodes(graph: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[Source, ExecutedNode]:
    """Every node that one run executes.

    Args:
        graph: the model that the builder was given.
        sizes: of the symbolic axes.
    """
    functions = {f.name: f for f in graph.functions}
    nodes: dict[Source, ExecutedNode] = {}

    def add(scope: Iterable[onnx.NodeProto], values: _Values, call: str, prefix: str) -> None:
        for node in scope:
            inputs = tuple(values[name] for name in node.input)
            inferred = _inferred(node, [value.shape for value in inputs])
            outputs = tuple(values.made(name, inferred) for name in node.output)
            if node.op_type not in functions:
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                nodes[prefix + node.name, call] = ExecutedNode(node.op_type, inputs, outputs, attributes)
                continue
            function = functions[node.op_type]
            said = _shapes(function.value_info, sizes)
            inner = _Values(said, {})
            formals = [*zip(function.input, inputs, strict=False), *zip(function.output, outputs, strict=False)]
            for name, value in formals:
                inner[name] = value if value.shape is not None else Value(value.name, said.get(name), value.weight)
            add(function.node, inner, call or node.name, f"{prefix}{node.name}/" if call else "")

    main = graph.graph
    weights = {
        t.name: Value(t.name, tuple(Dim(size) for size in t.dims), weight=True)
        for t in main.initializer
    }  # fmt: skip
    add(main.node, _Values(_shapes([*main.input, *main.output, *main.value_info], sizes), weights), "", "")
    return nodes


class _Values(dict[str, Value]):
    """The values of one scope; one that is named for the first time has the shape that the scope says."""

    def __init__(self, shapes: Mapping[str, Shape | None], known: Mapping[str, Value]):
        super().__init__(known)
        self._shapes = shapes

    def __missing__(self, name: str) -> Value:
        return self.made(name, None)

    def made(self, name: str, inferred: Shape | None) -> Value:
        """A value, where the scope does not say its shape with the one that was inferred."""
        if name not in self:
            self[name] = Value(name, self._shapes.get(name) or inferred)
        return self[name]


def _inferred(node: onnx.NodeProto, inputs: Sequence[Shape | None]) -> Shape | None:
    """What a node of a small generic function makes: such functions serve every shape, and say none."""
    if node.op_type == "Constant":
        return () if node.attribute[0].name in ("value_float", "value_int") else None
    if node.op_type == "CastLike":
        return inputs[0]
    known = [shape for shape in inputs if shape is not None]
    if node.op_type not in _ELEMENTWISE or len(known) < len(inputs):
        return None
    axes = itertools.zip_longest(*(reversed(shape) for shape in known), fillvalue=Dim(1))
    return tuple(max(dims, key=lambda dim: (dim.size, dim.dynamic)) for dims in axes)[::-1]


def _shapes(values: Iterable[onnx.ValueInfoProto], sizes: Mapping[str, int]) -> dict[str, Shape | None]:
    return {value.name: shape_of(value, sizes) for value in values}


def shape_of(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> Shape | None:
    """A value's shape at sizes of the axes; None where the graph says none, or names another axis."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    dims = []
    for dim in tensor.shape.dim:
        if dim.dim_param:
            try:
                dims.append(Dim(axis_size(dim.dim_param, sizes), dynamic=True))
            except KeyError:
                return None
        elif dim.HasField("dim_value"):
            dims.append(Dim(dim.dim_value))
        else:
            return None
    return tuple(dims)
