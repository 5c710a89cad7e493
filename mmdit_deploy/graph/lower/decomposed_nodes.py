"""New nodes in the place of one: what spells an op out writes with it.

    new = Replacement(gelu)
    half = new("Mul", x, new.number(0.5, x))
    new.done(half)

Names say where nodes come from: those in the place of ``gelu`` are ``gelu/Mul``, ``gelu/Mul_2`` and so on.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.passes import label


class Replacement:
    """Nodes before one that they are to replace.

    Args:
        node: goes when `done` is called.
    """

    def __init__(self, node: ir.Node):
        assert node.graph is not None
        self._node, self._graph = node, node.graph
        self._counts: Counter[str] = Counter()

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """A node's one output.

        Args:
            dtype: of the output, where it is not that of the first input.
        """
        self._counts[op_type] += 1
        suffix = op_type if self._counts[op_type] == 1 else f"{op_type}_{self._counts[op_type]}"
        made = ir.node(op_type, inputs, attributes=attributes, name=f"{label(self._node)}/{suffix}")
        out = made.outputs[0]
        out.name = f"{next(o.name for o in self._node.outputs if o.name)}.{suffix}"
        if dtype is not None:
            out.type = ir.TensorType(dtype)
        elif inputs and inputs[0] is not None:
            out.type = inputs[0].type
        if op_type == "Constant":
            out.shape = attributes["value"].shape
        self._graph.insert_before(self._node, made)
        return out

    def ints(self, *numbers: int) -> ir.Value:
        """A list of ints."""
        tensor = ir.tensor(np.array(numbers, np.int64))
        return self("Constant", value=tensor, dtype=ir.DataType.INT64)

    def number(self, number: float, like: ir.Value) -> ir.Value:
        """A scalar of the type of another value, known or not."""
        if like.dtype is not None:
            return self("Constant", value=ir.tensor(number, dtype=like.dtype), dtype=like.dtype)
        scalar = self("Constant", value=ir.tensor(number, dtype=ir.DataType.FLOAT), dtype=ir.DataType.FLOAT)
        made = self("CastLike", scalar, like)
        made.type = like.type
        return made

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in a type; the value itself where that is its type."""
        return value if value.dtype == dtype else self("Cast", value, to=dtype, dtype=dtype)

    def cast_like(self, value: ir.Value, other: ir.Value) -> ir.Value:
        """A value in the type of another, known or not."""
        if other.dtype is not None:
            return self.cast(value, other.dtype)
        made = self("CastLike", value, other)
        made.type = other.type
        return made

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """0 is what it was, -1 what is left."""
        return self("Reshape", value, self.ints(*shape))

    def dims(self, value: ir.Value, start: int, end: int) -> ir.Value:
        """Some dims of a value, as a list."""
        return self("Shape", value, start=start, end=end, dtype=ir.DataType.INT64)

    def done(self, *results: ir.Value | None) -> None:
        """Let everything read these instead of the node's outputs, and take the node away."""
        for old, new in zip(self._node.outputs, results, strict=False):
            if new is None:
                continue
            new.type, new.shape = old.type or new.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.name, old.name = old.name, None
        self._graph.remove(self._node, safe=True)


def own_attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as plain values.

    Raises:
        UsageError: one is an attribute of the function around it, so what it is differs from call to call.
    """
    given = [a for a in node.attributes.values() if a.is_ref()]
    if given:
        raise UsageError(
            f"what {node.op_type} computes must be known to be spelled out",
            received=f"{label(node)}, whose {given[0].name} is given by each call of the function around it",
            fix="write the functions out (onnx.inliner)",
        )
    return {name: a.value for name, a in node.attributes.items()}


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Every node of one of ONNX's own ops: in the graph, in functions, in branches and loop bodies."""
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    return [n for scope in scopes for n in scope.all_nodes() if n.domain == "" and n.op_type == op_type]
