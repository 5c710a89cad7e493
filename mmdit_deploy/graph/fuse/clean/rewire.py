"""What the clean-up passes share: every node of a model, and taking one out of the way."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

# Each call gives something else, so two are never one, and none is a constant.
RANDOM = frozenset(
    "Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split()
)
_SMALL = 64  # elements: shapes, axes, pads


def every_node(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the graph, of its branches and loop bodies, and of the functions; they may be removed meanwhile."""
    for scope in every_scope(model):
        yield from list(scope.all_nodes())


def every_scope(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """The graph and the functions."""
    return [model.graph, *model.functions.values()]


def is_plain(node: ir.Node) -> bool:
    """Whether a node is one of ONNX's own that has no graphs in it, and no attribute of a function around it."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return node.domain == "" and not any(a.is_ref() or a.type in graphs for a in node.attributes.values())


def small_constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a value that is known ahead and no weight: a single number, or integers such as a shape or axes.

    An input that has a default is not known ahead. Weights are not even looked at.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) > 1:
        return None
    is_shape = tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL
    return tensor if tensor.size == 1 or (is_shape and tensor.size <= _SMALL) else None


def replace(node: ir.Node, value: ir.Value) -> bool:
    """Let everything that reads a node's output read another value, and remove the node.

    Not where the output is one of the graph's: that would have to change its name, or come from nowhere.

    Returns:
        Whether it was done.
    """
    out = node.outputs[0]
    if out.is_graph_output() or any(other.uses() or other.is_graph_output() for other in node.outputs[1:]):
        return False
    if value.type is None:
        value.type = out.type
    if value.shape is None and not value.is_graph_input():
        value.shape = out.shape
    out.replace_all_uses_with(value)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True
