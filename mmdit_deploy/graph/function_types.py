"""Types and shapes of functions' inputs, from their calls: an ONNX file does not say them, and rules need them.

    f(x [batch, 64], w [64, 64]) called   ⇒   f's x is [batch, 64], f's w is [64, 64]

Where calls differ, the type or the dim stays unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir


def type_function_inputs(model: ir.Model, callers_first: Iterable[ir.OperatorIdentifier]) -> int:
    """Give every function's inputs what all of its calls agree on.

    Args:
        model: changed in place.
        callers_first: its functions in an order in which each comes before those that it calls.

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
        for i, value in enumerate(model.functions[name].inputs):
            given = [node.inputs[i] if i < len(node.inputs) else None for node in calls[name]]
            count += _agree(value, given)
        collect(model.functions[name].all_nodes())
    return count


def _agree(value: ir.Value, given: Sequence[ir.Value | None]) -> bool:
    present = [v for v in given if v is not None]
    if not present or len(present) < len(given):
        return False  # an optional input that some calls leave out
    first = present[0]
    if value.type is None and all(v.type == first.type for v in present):
        value.type = first.type
    shapes = [v.shape for v in present if v.shape is not None]
    if value.shape is not None or len(shapes) < len(present) or len({len(s) for s in shapes}) > 1:
        return False
    # `None` is a dim of which nothing is known
    value.shape = ir.Shape([dims[0] if len(set(dims)) == 1 else None for dims in zip(*shapes, strict=True)])
    return True
