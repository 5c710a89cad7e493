"""Cut one call out of a graph, with exactly the weights that the graph gives it."""

from __future__ import annotations

import onnx

from mmdit_deploy.errors import GraphError


def extract_call(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model of one call: its activations as inputs, its weights by the same references.

    Nodes that depend on weights alone (casts of weights) come along, so that every weight of the call is taken from
    where the whole graph takes it.

    Args:
        model: the whole graph; not changed.
        name: the call's node name, e.g. ``blocks.3``.

    Raises:
        GraphError: there is no such node.
    """
    graph = model.graph
    node = next((n for n in graph.node if n.name == name), None)
    if node is None:
        raise GraphError(
            f"the graph has one node per call; there is no {name!r}", fix="export the bundle again"
        )
    initializers = {i.name: i for i in graph.initializer}
    producers = {out: n for n in graph.node for out in n.output}
    values = {v.name: v for v in [*graph.value_info, *graph.input, *graph.output]}

    constant: dict[str, bool] = {}

    def is_constant(value: str) -> bool:
        if value not in constant:
            producer = producers.get(value)
            constant[value] = value in initializers or (
                producer is not None and all(map(is_constant, producer.input))
            )
        return constant[value]

    nodes: list[onnx.NodeProto] = []

    def take(value: str) -> None:
        producer = producers.get(value)
        if producer is not None and producer not in nodes:
            for source in producer.input:
                take(source)
            nodes.append(producer)

    for value in node.input:
        if is_constant(value):
            take(value)
    nodes.append(node)
    used = {value for n in nodes for value in n.input}
    activations = list(dict.fromkeys(value for value in node.input if not is_constant(value)))

    part = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(f for f in model.functions if any(f.name == n.op_type for n in nodes))
    part.graph.name = name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(initializers[v] for v in initializers if v in used)
    part.graph.input.extend(values[v] for v in activations)
    part.graph.output.extend(values[v] for v in node.output)
    return part
