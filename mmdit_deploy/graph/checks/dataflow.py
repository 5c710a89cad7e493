"""Whether values of an ONNX graph are each made once, under a name of their own, before they are read.

y = f(x), z = g(y)   and not   z = g(y), y = f(x)   nor   y = f(z), z = g(y)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.calls import shown_circle
from mmdit_deploy.graph.walk import all_nodes, named, node_label, subgraphs

_AGAIN = "get the file again, or export it again"


def check_graph(graph: onnx.GraphProto, outer: tuple[set[str], ...] = ()) -> None:
    """Check a graph, and those nested in it.

    Args:
        graph: of the model, or of an attribute.
        outer: names of the graphs around it, which it may read.

    Raises:
        UsageError: two values have one name, or one is read that is not made before.
    """
    inputs = [value.name for value in graph.input]
    weights = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    # An initializer may have the name of an input: it is its default.
    for names, what in ((inputs, "an input"), (weights, "an initializer")):
        _check_unique(names, what)
    made = {*inputs, *weights}
    _check_nodes(graph.node, made, outer)
    _check_outputs([value.name for value in graph.output], (*outer, made), f"the graph {named(graph.name)}")


def check_function(function: onnx.FunctionProto) -> None:
    """Check a function: it reads nothing but its inputs.

    Raises:
        UsageError: as of a graph.
    """
    where = f"the function {named(function.name)}"
    _check_unique(function.input, f"an input of {where}")
    made = set(function.input)
    _check_nodes(function.node, made, ())
    _check_outputs(function.output, (made,), where)


def _check_unique(names: Sequence[str], what: str) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise _made_twice(f"{what} is called {named(name)}, and another one too")
    if "" in names:
        raise UsageError("values of an ONNX graph must have names", received=f"{what} without one", fix=_AGAIN)


def _made_twice(received: str) -> UsageError:
    return UsageError(
        "each value of an ONNX graph must be made once, under a name of its own", received=received, fix=_AGAIN
    )


def _check_nodes(nodes: Sequence[onnx.NodeProto], made: set[str], outer: tuple[set[str], ...]) -> None:
    """Check that each node reads what comes before it, and add what it makes to `made`."""
    for node in nodes:
        for name in node.input:
            if name and name not in made and not any(name in names for names in outer):
                raise _unmade(node, name, nodes)
        for attribute in node.attribute:
            for graph in subgraphs(attribute):
                check_graph(graph, (*outer, made))
        for name in node.output:
            if name in made:
                raise _made_twice(f"{node_label(node)} makes {named(name)}, which is there already")
            if name:
                made.add(name)


def _unmade(node: onnx.NodeProto, name: str, nodes: Sequence[onnx.NodeProto]) -> UsageError:
    makers = {output: i for i, maker in enumerate(nodes) for output in maker.output if output}
    if name not in makers:
        return UsageError(
            "what a node reads must be an input, an initializer, or made by a node",
            received=f"{node_label(node)} reads {named(name)}, which nothing makes",
            fix=_AGAIN,
        )
    try:
        TopologicalSorter(
            {i: {makers[n] for n in _reads(reader) if n in makers} for i, reader in enumerate(nodes)}
        ).prepare()
    except CycleError as error:
        return UsageError(
            "a graph must be without circles: no node may read what is made from its own results",
            received=shown_circle([node_label(nodes[i]) for i in reversed(error.args[1])], " reads from "),
            fix=_AGAIN,
        )
    return UsageError(
        "nodes of an ONNX graph must come after those that they read from",
        received=f"{node_label(node)} comes before {node_label(nodes[makers[name]])}, and reads {named(name)} from it",
        fix="sort the graph (onnx-graphsurgeon's toposort), or export it again",
    )


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, and what its branches and loop bodies do."""
    for inner in all_nodes([node]):
        yield from inner.input


def _check_outputs(names: Iterable[str], known: tuple[set[str], ...], where: str) -> None:
    for name in names:
        if not any(name in made for made in known):
            raise UsageError(
                "what a graph gives must be an input, an initializer, or made by a node",
                received=f"{where} gives {named(name)}, which nothing makes",
                fix=_AGAIN,
            )
