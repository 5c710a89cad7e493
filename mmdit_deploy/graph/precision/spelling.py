"""Nodes with typed values, spelled one after the other: rewrite rules and TensorRT read the types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

Dims = Sequence[int | ir.SymbolicDim | str | None]


def dims_of(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """A value's dims, which are known."""
    assert value.shape is not None, f"{value.name} has no shape"
    return list(value.shape)


def sizes_of(value: ir.Value) -> tuple[int, ...]:
    """The sizes of a weight."""
    return tuple(dim for dim in dims_of(value) if isinstance(dim, int))


class Spelling:
    """The nodes of a computation, in order, to be inserted into a function.

    Args:
        prefix: what the names of nodes and values begin with.
    """

    def __init__(self, prefix: str):
        self._prefix = prefix
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType,
        dims: Dims,
        **attributes: Any,
    ) -> ir.Value:
        """One more node of ONNX's own domain.

        Args:
            name: of the node, after the prefix and a dot; its value is called so too.
            dtype, dims: of its value.
        """
        node = ir.node(op, inputs, attributes=attributes, name=f"{self._prefix}.{name}")
        made = node.outputs[0]
        made.name, made.type, made.shape = node.name, ir.TensorType(dtype), ir.Shape(dims)
        self.nodes.append(node)
        return made

    def number(self, value: float, name: str, dtype: ir.DataType) -> ir.Value:
        """A scalar constant."""
        return self("Constant", [], name, dtype, [], value=ir.tensor(value, dtype=dtype))

    def ints(self, values: Sequence[int], name: str) -> ir.Value:
        """A constant list of axes or sizes."""
        tensor = ir.tensor(list(values), dtype=ir.DataType.INT64)
        return self("Constant", [], name, ir.DataType.INT64, [len(values)], value=tensor)
