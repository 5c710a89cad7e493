"""Channels that come first: PyTorch's repeat_interleave by a tensor of twos, as optimum's exports have it.

    Transpose(GatherND(Expand(Unsqueeze(Transpose(x [N, D]), 1), [D, 2, N]), NonZero(Less([0, 1], [2, 2, …]))))

which is every channel of x twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.fuse.known_values import known
from mmdit_deploy.graph.fuse.rotary.channels import MOST, Channels


def rows(value: ir.Value | None, read: Callable[[ir.Value], Channels | None]) -> Channels | None:
    """The channels of a value [D, …, N], as those of one that has them last; None where that is not known.

    Args:
        read: what gives the channels of a value that has them last.
    """
    node = value.producer() if value is not None else None
    if node is None or value is None or not node.inputs or node.inputs[0] is None or given_by_call(node) is not None:
        return None
    if is_turned(node):
        data = read(node.inputs[0])
        return data if data is not None and len(data.axes) == data.grid.ndim == 1 else None
    if node.op_type not in ("Unsqueeze", "Expand", "GatherND"):
        return None
    data = rows(node.inputs[0], read)
    if data is None:
        return None
    if node.op_type == "GatherND":
        return _looked_up(data, _places(node.inputs[1]))
    dims = value.shape[:-1] if value.shape is not None else ()
    inner = tuple(size for size in dims if isinstance(size, int))
    if not inner or len(inner) < len(dims):
        return None
    if node.op_type == "Expand":
        return _expanded(data, inner)
    return Channels(data.axes, data.grid.reshape(inner)) if math.prod(inner) == data.grid.size else None


def is_turned(node: ir.Node) -> bool:
    """Whether it is a Transpose of a matrix."""
    perm = node.attributes.get("perm") if node.op_type == "Transpose" and given_by_call(node) is None else None
    return perm is not None and perm.as_ints() == (1, 0)


def _expanded(data: Channels, shape: tuple[int, ...]) -> Channels | None:
    pairs = zip(data.grid.shape, shape, strict=False)
    if len(shape) != data.grid.ndim or any(old not in (1, new) for old, new in pairs) or math.prod(shape) > MOST:
        return None
    return Channels(data.axes, np.broadcast_to(data.grid, shape))


def _looked_up(data: Channels, places: np.ndarray | None) -> Channels | None:
    if places is None or places.ndim != 2 or places.shape[1] != data.grid.ndim:
        return None
    if np.any(places < 0) or np.any(places >= data.grid.shape):
        return None
    return Channels(data.axes, data.grid[tuple(places.T)])


def _places(value: ir.Value | None) -> np.ndarray | None:
    """The places of a matrix at which one constant is less than another, one after the other."""
    nodes = []
    for op_type in ("Transpose", "NonZero", "Less"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op_type:
            return None
        nodes.append(node)
        value = node.inputs[0]
    one, other = (known(v) for v in nodes[-1].inputs)
    if one is None or other is None or not is_turned(nodes[0]):
        return None
    return np.argwhere(np.less(one, other))
