"""How low the numbers of a value can be, without running the graph.

    Where(mask, 0, -65504)   ⇒   -65504

Looked up through what moves values, and in and out of functions. Of what is not known it is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.fuse.known_values import known

_MOVED = frozenset("Expand Gather Identity Reshape Slice Squeeze Transpose Unsqueeze".split())
_DEEPEST = 64  # nodes from a value to what it is made of


class Lowest:
    """Of the values of a model, as it was when this was made."""

    def __init__(self, model: ir.Model):
        self._functions = dict(model.functions)
        self._given: dict[ir.Value, list[ir.Value | None]] = {}
        self._found: dict[ir.Value, float] = {}
        self._given_by_calls(model.graph.all_nodes())
        for function in model.functions.values():
            self._given_by_calls(function.all_nodes())

    def _given_by_calls(self, nodes: Iterable[ir.Node]) -> None:
        for node in nodes:
            function = self._functions.get(node.op_identifier())
            for i, value in enumerate(function.inputs if function is not None else ()):
                self._given.setdefault(value, []).append(node.inputs[i] if i < len(node.inputs) else None)

    def __call__(self, value: ir.Value | None, depth: int = 0) -> float:
        """The lowest that a value can be."""
        if value is None or depth > _DEEPEST:
            return -math.inf
        if value not in self._found:
            self._found[value] = self._of(value, depth + 1)
        return self._found[value]

    def _of(self, value: ir.Value, depth: int) -> float:
        if value.dtype == ir.DataType.BOOL:
            return 0.0
        if value in self._given:  # of a function: in all of its calls
            return min(self(given, depth) for given in self._given[value])
        elements = known(value)
        if elements is not None:
            lowest = float(np.min(elements, initial=math.inf))
            return -math.inf if math.isnan(lowest) else lowest
        node = value.producer()
        if node is None:
            return -math.inf
        function = self._functions.get(node.op_identifier())
        if function is not None:
            return self(function.outputs[value.index() or 0], depth)
        if node.domain != "" or given_by_call(node) is not None:
            return -math.inf
        lowest = self._made_by(node, lambda v: self(v, depth))
        # Less than its type can hold is infinite.
        return lowest if value.dtype is not None and lowest >= float(value.dtype.min) else -math.inf

    def _made_by(self, node: ir.Node, lowest: Callable[[ir.Value | None], float]) -> float:
        first = node.inputs[0] if node.inputs else None
        if node.op_type in _MOVED or node.op_type == "Cast":
            return lowest(first)
        if node.op_type in ("Concat", "Where"):
            return min(map(lowest, node.inputs[1:] if node.op_type == "Where" else node.inputs))
        if node.op_type == "Max":
            return max(map(lowest, node.inputs))
        if node.op_type == "Clip":
            return max(map(lowest, node.inputs[:2]))
        if node.op_type == "Add":
            return sum(map(lowest, node.inputs))
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return 0.0 if fill is None else float(fill.as_tensor().numpy().min())
        return -math.inf
