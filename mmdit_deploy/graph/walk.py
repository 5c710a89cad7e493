"""Everything that is nested in an ONNX message: nodes of branches and loop bodies, and tensors wherever they may be.

Protobuf reads at most 100 messages within each other, so nesting is bounded, and recursion with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx


def subgraphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    """The graphs of an attribute: the branches of an If, the body of a Loop."""
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their branches and loop bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in subgraphs(attribute):
                yield from all_nodes(graph.node)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those nested in it."""
    yield graph
    yield from _nested(graph.node)


def model_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Every graph of a model, those nested in functions too."""
    yield from all_graphs(model.graph)
    for function in model.functions:
        yield from _nested(function.node)


def model_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model: of its graphs and of its functions."""
    yield from all_nodes(model.graph.node)
    for function in model.functions:
        yield from all_nodes(function.node)


def model_tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Every tensor of a model, and what to call it."""
    for graph in model_graphs(model):
        for tensor in graph.initializer:
            yield tensor, f"the initializer {named(tensor.name)}"
        for sparse in graph.sparse_initializer:
            yield sparse.values, f"the values of the sparse initializer {named(sparse.values.name)}"
            yield sparse.indices, f"the indices of the sparse initializer {named(sparse.values.name)}"
    for attribute, what in model_attributes(model):
        for tensor in attribute.tensors:
            yield tensor, what
        if attribute.HasField("t"):
            yield attribute.t, what


def model_attributes(model: onnx.ModelProto) -> Iterator[tuple[onnx.AttributeProto, str]]:
    """Every attribute of a model, and what to call it: of nodes, and the defaults of functions."""
    for node in model_nodes(model):
        for attribute in node.attribute:
            yield attribute, f"the attribute {named(attribute.name)} of {node_label(node)}"
    for function in model.functions:
        for attribute in function.attribute_proto:
            yield attribute, f"the default {named(attribute.name)} of the function {named(function.name)}"


def node_label(node: onnx.NodeProto) -> str:
    """A node for people, by its op, its name and what it makes."""
    makes = next((f" that makes {named(name)}" for name in node.output if name), "")
    return f"the {node.op_type} {named(node.name)}{makes}" if node.name else f"the {node.op_type}{makes}"


def named(name: str | bytes) -> str:
    """A name out of a file, for people: in quotes, in ASCII, and not longer than a line."""
    shown = ascii(name)
    return shown if len(shown) <= 80 else f"{shown[:60]}… ({len(name)} characters)"


def _nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in subgraphs(attribute):
                yield from all_graphs(graph)
