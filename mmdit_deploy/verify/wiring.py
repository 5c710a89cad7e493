"""Does every call of a graph read what the model's call reads?

Calls that are cut out and fed one by one compute the same wherever their inputs came from: only the whole engine, or
this look at the graph, sees a block that was given another block's modulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx

from mmdit_deploy.errors import GraphError
from mmdit_deploy.model import Call

Source = tuple[str, int]  # a call's path and which of its outputs; a graph input has -1


@dataclass(frozen=True)
class Miswired:
    """A value that is read where another should be.

    Args:
        reader: the call; of a graph's output the call that should make it.
        rule: what must be read, and by whom.
        received: what is read in its place.
    """

    reader: str
    rule: str
    received: str


def check_wiring(model: onnx.ModelProto, calls: Sequence[Call]) -> None:
    """Compare where calls and graph outputs get their values from with the model's chain; casts are looked through.

    Raises:
        GraphError: the first call or output that reads something else.
    """
    for found in miswired(model, calls):
        raise GraphError(
            found.rule,
            received=found.received,
            fix="export the bundle again; if that does not help, report this as a bug",
        )


def miswired(model: onnx.ModelProto, calls: Sequence[Call]) -> Iterator[Miswired]:
    """What `check_wiring` refuses, in the order of the model."""
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
            yield from _compared(call.path, call.path, name, source(value), expected.get(name, (name, -1)))
        expected.update({name: (call.path, i) for i, name in enumerate(call.outputs)})
    for output in model.graph.output:
        if output.name in expected:
            maker = expected[output.name]
            yield from _compared(maker[0], "the graph's output", output.name, source(output.name), maker)


def _compared(path: str, reader: str, name: str, received: Source, expected: Source) -> Iterator[Miswired]:
    if received != expected:
        rule = f"{reader} must read {name}, made by {_shown(expected)}"
        yield Miswired(path, rule, f"a value made by {_shown(received)}")


def _shown(source: Source) -> str:
    path, index = source
    return "the caller" if index < 0 else f"output {index} of {path}"
