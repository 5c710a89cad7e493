"""Heads: in the batch axis or in one of their own, and shared by groups of queries or not.

B batch, H heads, KV heads of K and V, G heads of Q for each, N tokens, D width
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.fuse.known_values import known

Dim = int | ir.SymbolicDim
Dims = Sequence[Dim]
LAST_TWO = {3: (0, 2, 1), 4: (0, 1, 3, 2)}  # by rank: the perm that swaps tokens and width
HEADS_AND_TOKENS = (0, 2, 1, 3)  # the perm that swaps heads and tokens


def dims_of(value: ir.Value) -> tuple[Dim, ...]:
    """The shape of a value that has one."""
    assert value.shape is not None
    return tuple(value.shape)


def perm_of(node: ir.Node | None) -> tuple[int, ...]:
    """Of a Transpose; of anything else nothing."""
    if node is None or node.op_type != "Transpose" or node.domain != "":
        return ()
    return tuple(node.attributes.get_ints("perm", ()) or ())


def same_dims(one: Dims, other: Dims) -> bool:
    """Whether dims are known to be equal: two that nothing is known of are not."""
    named = all(isinstance(d, int) or d.value is not None for d in one)
    return named and len(one) == len(other) and all(a == b for a, b in zip(one, other, strict=True))


def stretches(one: Dims, other: Dims) -> bool:
    """Whether a sum with another value may have more elements than the one: a name may stand for 1, or for more."""
    if len(other) > len(one):
        return True
    pairs = zip(list(one)[len(one) - len(other) :], other, strict=True)
    return any(added != 1 and not same_dims([old], [added]) for old, added in pairs)


def broadcast(one: Dims, other: Dims) -> list[Dim]:
    """The shape of a sum."""
    rank = max(len(one), len(other))
    pairs = zip([1] * (rank - len(one)) + list(one), [1] * (rank - len(other)) + list(other), strict=True)
    return [b if a == 1 else a for a, b in pairs]


def before_merging(value: ir.Value) -> ir.Value | None:
    """Of Reshape(x [B, H, N, D]) → [B·H, N, D] the x; H is a number."""
    x = _read_by(value, "Reshape")
    if x is None or x.shape is None or value.shape is None or len(x.shape) != 4 or len(value.shape) != 3:
        return None
    # The last two axes are the same, so the first is all that is left: B·H, in that order.
    return x if isinstance(x.shape[1], int) and same_dims(dims_of(x)[2:], dims_of(value)[1:]) else None


def before_sharing(value: ir.Value, axis: int) -> ir.Value | None:
    """Of Reshape(Expand(Unsqueeze(x))), which repeats each head for the next G heads of Q, the x.

        [B, KV, N, D]  →  [B, KV, 1, N, D]  →  [B, KV, G, N, D]  →  [B, KV·G, N, D]

    Args:
        value: of four axes.
        axis: of heads.
    """
    repeated = _read_by(value, "Reshape")
    alone = None if repeated is None else _read_by(repeated, "Expand", "Tile")
    x = None if alone is None else _read_by(alone, "Unsqueeze")
    if repeated is None or alone is None or x is None or x.shape is None or value.shape is None or len(x.shape) != 4:
        return None
    axes, groups, shared = known(_input(alone, 1)), _times(repeated, axis + 1), dims_of(x)[axis]
    if axes is None or axes.tolist() not in ([axis + 1], axis + 1) or groups is None or not isinstance(shared, int):
        return None
    expected = list(dims_of(x))
    expected[axis] = shared * groups
    return x if same_dims(expected, dims_of(value)) else None


def _read_by(value: ir.Value, *ops: str) -> ir.Value | None:
    """What the maker of a value reads, if that is one of these ops."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type in ops and node.domain == "" else None


def _input(value: ir.Value, index: int) -> ir.Value | None:
    node = value.producer()
    return node.inputs[index] if node is not None and len(node.inputs) > index else None


def _times(repeated: ir.Value, axis: int) -> int | None:
    """How often the maker of a value repeats one axis of 1, if it repeats no other."""
    before = _input(repeated, 0)
    if before is not None and before.shape is not None and repeated.shape is not None:
        old, new = list(dims_of(before)), list(dims_of(repeated))
        if len(old) == len(new) and same_dims(old[:axis] + old[axis + 1 :], new[:axis] + new[axis + 1 :]):
            times = new[axis]
            return times if isinstance(times, int) else None
    factors = known(_input(repeated, 1))  # a shape of Expand, or repeats of Tile
    if factors is None or factors.ndim != 1 or len(factors) <= axis or np.any(np.delete(factors, axis) != 1):
        return None
    return int(factors[axis])
