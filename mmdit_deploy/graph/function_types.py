"""Types and shapes of functions' inputs, from their calls: an ONNX file does not say them, and rules need them.

    f(x [batch, img, 64], y [batch, img, 64], z [batch, 64])  ┐      f's x, y are [batch, f_dim_0, 64],
    f(x [batch, txt, 64], y [batch, txt, 64], z [batch, 96])  ┘  ⇒   f's z is [batch, f_dim_1]

What all calls agree on stays. Where they differ the type is unknown, and a dim gets a name of its own, which is the
same wherever the same dims meet: in each call x and y are equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from graphlib import TopologicalSorter

import onnx_ir as ir

_Dims = tuple[int | ir.SymbolicDim, ...]  # one dim of an input, in each call


def callers_first(model: ir.Model) -> list[ir.OperatorIdentifier]:
    """Functions in an order in which each comes before those that it calls.

    Raises:
        ValueError: they call each other in a circle.
    """
    callees = {
        name: {node.op_identifier() for node in function.all_nodes()} & model.functions.keys()
        for name, function in model.functions.items()
    }
    return list(TopologicalSorter(callees).static_order())[::-1]


def type_function_inputs(
    model: ir.Model,
    callers_first: Iterable[ir.OperatorIdentifier],
    then: Callable[[ir.Function], object] | None = None,
) -> int:
    """Give every function's inputs what all of its calls agree on.

    Args:
        model: changed in place.
        callers_first: its functions in an order in which each comes before those that it calls.
        then: called with each function when its inputs are typed, and before those of the functions that it calls.

    Returns:
        How many inputs got a shape.
    """
    calls: dict[ir.OperatorIdentifier, list[ir.Node]] = {name: [] for name in model.functions}

    def collect(nodes: Iterable[ir.Node]) -> None:
        for node in nodes:
            if node.op_identifier() in calls:
                calls[node.op_identifier()].append(node)

    collect(model.graph.all_nodes())
    count = 0
    for name in callers_first:
        function = model.functions[name]
        names: dict[_Dims, ir.SymbolicDim] = {}
        for i, value in enumerate(function.inputs):
            given = [node.inputs[i] if i < len(node.inputs) else None for node in calls[name]]
            count += _agree(value, given, names, function.name)
        if then is not None:
            then(function)
        collect(function.all_nodes())
    return count


def _agree(
    value: ir.Value, given: Sequence[ir.Value | None], names: dict[_Dims, ir.SymbolicDim], function: str
) -> bool:
    present = [v for v in given if v is not None]
    if not present or len(present) < len(given):
        return False  # an optional input that some calls leave out
    first = present[0]
    if value.type is None and all(v.type == first.type for v in present):
        value.type = first.type
    shapes = [v.shape for v in present if v.shape is not None]
    if value.shape is not None or len(shapes) < len(present) or len({len(s) for s in shapes}) > 1:
        return False
    value.shape = ir.Shape([_common(tuple(dims), names, function) for dims in zip(*shapes, strict=True)])
    return True


def _common(dims: _Dims, names: dict[_Dims, ir.SymbolicDim], function: str) -> int | ir.SymbolicDim:
    if any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in dims):
        return ir.SymbolicDim(None)  # of which nothing is known
    if len(set(dims)) == 1:
        return dims[0]
    if dims not in names:
        stem = "".join(c if c.isalnum() else "_" for c in function)
        names[dims] = ir.SymbolicDim(f"{stem}_dim_{len(names)}")
    return names[dims]
