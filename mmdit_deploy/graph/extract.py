"""Cut calls out of a graph, with exactly the weights that the graph gives them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx

from mmdit_deploy.errors import GraphError


def extract_call(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model of one call: its activations as inputs, all of its outputs, its weights by the same references.

    Args:
        model: the whole graph; not changed.
        name: the call's node name, e.g. ``blocks.3``.

    Raises:
        GraphError: there is no such node.
    """
    node = next((n for n in model.graph.node if n.name == name), None)
    if node is None:
        raise GraphError(f"the graph has one node per call; there is no {name!r}", fix="export the bundle again")
    return _cut(model, name, [node], node.output)


def extract_segment(model: onnx.ModelProto, calls: Collection[str], name: str) -> onnx.ModelProto:
    """The model of a run of calls: what they read of others as inputs, what others read of them as outputs.

    Args:
        model: the whole graph; not changed. Every node of it is a call, or depends on weights alone.
        calls: node names.
        name: of the new graph.

    Returns:
        A model whose inputs and outputs have the names of the whole graph's values.

    Raises:
        GraphError: there is no such node.
    """
    nodes = [n for n in model.graph.node if n.name in calls]
    missing = sorted(set(calls) - {n.name for n in nodes})
    if missing:
        raise GraphError(f"the graph has a node for each call of {name}", received=f"no {', '.join(missing)}")
    read = {value for n in model.graph.node if n.name not in calls for value in n.input}
    read |= {value.name for value in model.graph.output}
    return _cut(model, name, nodes, [value for n in nodes for value in n.output if value in read])


def _cut(
    model: onnx.ModelProto, name: str, wanted: Iterable[onnx.NodeProto], outputs: Iterable[str]
) -> onnx.ModelProto:
    """The nodes, and with them those that make their inputs from weights alone (casts of weights).

    So every weight is taken from where the whole graph takes it.
    """
    graph = model.graph
    initializers = {i.name: i for i in graph.initializer}
    producers = {out: n for n in graph.node for out in n.output}
    values = {v.name: v for v in [*graph.value_info, *graph.input, *graph.output]}

    constant: dict[str, bool] = {}

    def is_constant(value: str) -> bool:
        if value not in constant:
            producer = producers.get(value)
            constant[value] = value in initializers or (producer is not None and all(map(is_constant, producer.input)))
        return constant[value]

    nodes: dict[str, onnx.NodeProto] = {}  # by first output

    def take(value: str) -> None:
        producer = producers.get(value)
        if producer is not None and producer.output[0] not in nodes:
            for source in producer.input:
                take(source)
            nodes[producer.output[0]] = producer

    for node in wanted:
        for value in node.input:
            if is_constant(value):
                take(value)
        nodes[node.output[0]] = node
    made = {value for n in nodes.values() for value in n.output}
    used = list(dict.fromkeys(value for n in nodes.values() for value in n.input))

    part = onnx.ModelProto(
        ir_version=model.ir_version, producer_name=model.producer_name, producer_version=model.producer_version
    )
    part.opset_import.extend(model.opset_import)
    called = set(_called(nodes.values(), {f.name: f for f in model.functions}))
    part.functions.extend(f for f in model.functions if f.name in called)
    part.graph.name = name
    part.graph.node.extend(nodes.values())
    part.graph.initializer.extend(initializers[v] for v in initializers if v in set(used))
    part.graph.input.extend(values[v] for v in used if v and not is_constant(v) and v not in made)
    part.graph.output.extend(values[v] for v in outputs)
    part.graph.value_info.extend(v for v in graph.value_info if v.name in made)
    return part


def _called(nodes: Iterable[onnx.NodeProto], functions: Mapping[str, onnx.FunctionProto]) -> Iterator[str]:
    """The functions that nodes call, and those that they call in turn."""
    for name in {n.op_type for n in nodes} & functions.keys():
        yield name
        yield from _called(functions[name].node, functions)
