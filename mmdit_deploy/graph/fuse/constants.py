"""What rules ask of constants. Weights are never loaded for it."""

from __future__ import annotations

import onnx_ir as ir


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer, or made by a Constant node."""
    return ir.convenience.get_const_tensor(value) is not None


def is_one(value: ir.Value) -> bool:
    """Whether a value is the number 1 in every run: one element, and exactly. Every type holds it."""
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and bool(tensor.numpy().item() == 1)


def adds_no_axis(one: ir.Value, other: ir.Value) -> bool:
    """Whether a constant of one element leaves the shape of what it is added to as it is."""
    tensor = ir.convenience.get_const_tensor(one)
    if tensor is None:
        return False
    rank = len(tensor.shape)
    return rank == 0 or (other.shape is not None and rank <= len(other.shape))
