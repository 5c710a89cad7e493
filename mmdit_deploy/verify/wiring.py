"""Does every call of a graph read what the model's call reads?

Calls that are cut out and fed one by one compute the same wherever their inputs came from: only the whole engine, or
this look at the graph, sees a block that was given another block's modulation.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from mmdit_deploy.errors import GraphError
from mmdit_deploy.model import Call

Source = tuple[str, int]  # a call's path and which of its outputs; a graph input has -1


def check_wiring(model: onnx.ModelProto, calls: Sequence[Call]) -> None:
    """Compare where calls and graph outputs get their values from with the model's chain; casts are looked through.

    Raises:
        GraphError: the first call or output that reads something else.
    """
    nodes = {node.name: node for node in model.graph.node}
    producers = {out: (node, i) for node in model.graph.node for i, out in enumerate(node.output)}

    def source(value: str) -> Source:
        while value in producers:
            node, index = producers[value]
            if node.op_type != "Cast":
                return node.name, index
            value = node.input[0]
        return value, -1

    expected: dict[str, Source] = {}
    for call in calls:
        if call.path not in nodes:
            continue  # taken up when the call is cut out
        for name, value in zip(call.inputs, nodes[call.path].input, strict=False):
            _compare(call.path, name, source(value), expected.get(name, (name, -1)))
        expected.update({name: (call.path, i) for i, name in enumerate(call.outputs)})
    for output in model.graph.output:
        if output.name in expected:
            _compare("the graph's output", output.name, source(output.name), expected[output.name])


def _compare(reader: str, name: str, received: Source, expected: Source) -> None:
    if received != expected:
        raise GraphError(
            f"{reader} must read {name}, made by {_shown(expected)}",
            received=f"a value made by {_shown(received)}",
            fix="export the bundle again; if that does not help, report this as a bug",
        )


def _shown(source: Source) -> str:
    path, index = source
    return "the caller" if index < 0 else f"output {index} of {path}"
