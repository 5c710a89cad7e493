"""What rules ask of constants. Weights are never loaded for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_SMALL = 64  # elements: ones and epsilons, and not weights


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer, or made by a Constant node."""
    return ir.convenience.get_const_tensor(value) is not None


def is_number(value: ir.Value, number: float) -> bool:
    """Whether a value is a small constant whose elements all are one number, up to the precision of their type."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or not 0 < tensor.size <= _SMALL:
        return False
    return bool(np.allclose(np.asarray(tensor.numpy(), dtype=np.float64), number, rtol=1e-3, atol=0))
