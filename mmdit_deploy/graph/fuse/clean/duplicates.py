"""What is there twice.

    two initializers of the same bytes            ⇒   one     (weights outside of the file: of the same place in it)
    two nodes of one op, attributes and inputs    ⇒   one     (Shape ─ Gather ─ Concat, once a block)

Each graph, branch, loop body and function by itself. Weights are compared by where they lie, never by what they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import onnx_ir as ir

from mmdit_deploy.graph.fuse.clean.rewire import RANDOM, is_plain, replace
from mmdit_deploy.graph.passes import Pass

_SMALL = 1024  # bytes of what is compared byte by byte


def _merge_initializers(model: ir.Model) -> int:
    count = 0
    for graph in model.graphs():
        first: dict[Hashable, ir.Value] = {}
        for name, value in list(graph.initializers.items()):
            if value.is_graph_input() or value.is_graph_output() or value.const_value is None:
                continue
            key = _content(value.const_value)
            if key is None or first.setdefault(key, value) is value:
                continue
            value.replace_all_uses_with(first[key])
            del graph.initializers[name]
            count += 1
    return count


def _content(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for tensors that are the same; None where that is not known without reading much."""
    kind = (tensor.dtype, tuple(tensor.shape))
    if isinstance(tensor, ir.ExternalTensor):
        return kind, str(tensor.location), tensor.offset or 0, tensor.length
    if tensor.dtype == ir.DataType.STRING or tensor.nbytes > _SMALL:
        return None
    return kind, tensor.tobytes()


def _merge_nodes(model: ir.Model) -> int:
    scopes: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    return sum(_merge_in(scope) for scope in scopes)


def _merge_in(nodes: Iterable[ir.Node]) -> int:
    count = 0
    first: dict[Hashable, ir.Node] = {}
    for node in list(nodes):
        if node.op_type in RANDOM or not is_plain(node):
            continue
        key = _computation(node)
        if key is None or first.setdefault(key, node) is node:
            continue
        count += _replace_by(node, first[key])
    return count


def _computation(node: ir.Node) -> Hashable:
    """Equal for nodes that compute the same."""
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            value = _content(attribute.as_tensor())
            if value is None:
                return None
        elif isinstance(value, list | tuple):
            value = tuple(value)
        # -0.0 equals 0.0, and is another number
        attributes.append((name, attribute.type, repr(value)))
    present = tuple(bool(out.name) for out in node.outputs)
    return node.op_type, present, tuple(id(value) for value in node.inputs), tuple(attributes)


def _replace_by(node: ir.Node, other: ir.Node) -> bool:
    if any(out.is_graph_output() for out in node.outputs):
        return False
    for out, same in zip(node.outputs[1:], other.outputs[1:], strict=True):
        out.replace_all_uses_with(same)
    return replace(node, other.outputs[0])


initializers: Pass = Pass("duplicate initializers", _merge_initializers)
expressions: Pass = Pass("common subexpressions", _merge_nodes)
