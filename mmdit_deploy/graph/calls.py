"""Functions of an ONNX file that call each other: in what order, how deep, and how much one run executes.

A file of a few kilobytes may nest calls so that they are more than anybody can count one by one: each function is
looked at once, however often it is called, and nothing recurses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.walk import all_nodes, named

Key = tuple[str, str, str]  # domain, name and overload of a function
MAX_CALL_DEPTH = 100  # onnx's own limit; runtimes crash somewhere beyond it
MAX_EXECUTED = 1_000_000  # nodes: a model of 60 blocks has ten thousand
_MANY = 10**15  # counts beyond it only come from files made to be counted
_SHOWN = 5  # members of a circle
_AGAIN = "get the file again, or export it again"


def functions_of(model: onnx.ModelProto) -> dict[Key, onnx.FunctionProto]:
    """A model's functions, by what calls name."""
    return {(f.domain, f.name, f.overload): f for f in model.functions}


def callees_first(functions: Mapping[Key, onnx.FunctionProto]) -> list[Key]:
    """The functions in an order in which each comes after those that it calls.

    Raises:
        UsageError: they call each other in a circle.
    """
    try:
        return list(TopologicalSorter(_callees(functions)).static_order())
    except CycleError as error:
        raise UsageError(
            "functions of an ONNX model must not call each other in a circle",
            received=shown_circle([named(key[1]) for key in reversed(error.args[1])], " calls "),
            fix=_AGAIN,
        ) from error


def executed_ops(model: onnx.ModelProto, *, whole: Iterable[tuple[str, str]] = ()) -> dict[str, int]:
    """Nodes by op type that one run executes: a function's nodes count once per call, a branch's nodes once.

    Op types of domains other than ONNX's own are written with their domain, as ``com.microsoft.MultiHeadAttention``.

    Args:
        model: parsed.
        whole: domain and name of functions that count as ops.

    Raises:
        UsageError: functions call each other in a circle.
    """
    as_ops = set(whole)
    functions = {key: f for key, f in functions_of(model).items() if key[:2] not in as_ops}
    counted: dict[Key, Counter[str]] = {}
    for key in callees_first(functions):
        counted[key] = _count(functions[key].node, counted)
    return dict(sorted(_count(model.graph.node, counted).items()))


def check_calls(model: onnx.ModelProto) -> None:
    """Check that calls end, not too deep, and that what they execute can be written out.

    Raises:
        UsageError: functions are defined twice, call each other in a circle, or are nested without measure.
    """
    functions = functions_of(model)
    if len(functions) < len(model.functions):
        twice, _ = Counter((f.domain, f.name, f.overload) for f in model.functions).most_common(1)[0]
        raise UsageError(
            "a function of an ONNX model must be defined once", received=f"{named(twice[1])} twice", fix=_AGAIN
        )
    callees, depth = _callees(functions), dict[Key, int]()
    for key in callees_first(functions):
        depth[key] = 1 + max((depth[callee] for callee in callees[key]), default=0)
    deepest = max(depth, key=lambda key: depth[key], default=None)
    if deepest is not None and depth[deepest] > MAX_CALL_DEPTH:
        raise UsageError(
            f"functions of an ONNX model must not be nested deeper than {MAX_CALL_DEPTH} calls",
            received=f"{named(deepest[1])}, with calls {depth[deepest]} deep",
            fix="write the functions out (onnx.inliner), or export the model again",
        )
    executed = sum(executed_ops(model).values())
    if executed > MAX_EXECUTED:
        raise UsageError(
            f"an ONNX model must execute at most {MAX_EXECUTED:,} nodes",
            received=f"{executed:,} nodes" if executed < _MANY else f"{_MANY:,} nodes or more",
            fix=_AGAIN,
        )


def shown_circle(members: Sequence[str], link: str) -> str:
    """The members of a circle, the first of which is the last too, for people."""
    more = len(members) - _SHOWN - 1
    return link.join(members if more <= 0 else [*members[:_SHOWN], f"… ({more} more)"])


def _callees(functions: Mapping[Key, onnx.FunctionProto]) -> dict[Key, set[Key]]:
    return {key: {_called(node) for node in all_nodes(f.node)} & functions.keys() for key, f in functions.items()}


def _called(node: onnx.NodeProto) -> Key:
    return node.domain, node.op_type, node.overload


def _count(nodes: Iterable[onnx.NodeProto], functions: Mapping[Key, Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for node in all_nodes(nodes):
        body = functions.get(_called(node))
        if body is not None:
            total.update(body)
        else:
            own = node.domain in ("", "ai.onnx")
            total[node.op_type if own else f"{node.domain}.{node.op_type}"] += 1
    return Counter({op: min(count, _MANY) for op, count in total.items()})
