"""How tensors from the conditioning meet those of tokens: B batch, N tokens, C channels.

A modulation has one vector per sample, [B, 1, C], or one per token, [B, N, C].
"""

from __future__ import annotations

import onnx_ir as ir


def may_be_equal(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two dims are the same, as far as is known: in a function that is called with both, they are not."""
    unknown = any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in (one, other))
    return unknown or one == other


def is_BNC(value: ir.Value) -> bool:
    """Whether a value is of tokens: it has three axes, and is not known to be of one token alone."""
    return value.shape is not None and len(value.shape) == 3 and value.shape[1] != 1


def are_alike(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values are of one shape."""
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    return all(map(may_be_equal, one.shape, other.shape))


def is_per_sample(value: ir.Value, tokens_BNC: ir.Value) -> bool:
    """Whether a value is [B, 1, C] for tokens [B, N, C]; B may be 1 for all samples."""
    vector, tokens = value.shape, tokens_BNC.shape
    if vector is None or tokens is None or not is_BNC(tokens_BNC) or len(vector) != 3:
        return False
    # A batch may have two names (optimum's is "step" for timesteps): they meet, so they are equal, or one of them is 1.
    differ = isinstance(vector[0], int) and isinstance(tokens[0], int) and vector[0] not in (1, tokens[0])
    return not differ and vector[1] == 1 and may_be_equal(vector[2], tokens[2])


def is_modulation(value: ir.Value, tokens_BNC: ir.Value) -> bool:
    """Whether a value has one vector per sample, or one per token."""
    return is_per_sample(value, tokens_BNC) or (is_BNC(tokens_BNC) and are_alike(value, tokens_BNC))
