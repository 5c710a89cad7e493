"""The shape and type of every value, with symbols for what is dynamic: rules compare them.

What can be derived from the inputs is derived, in functions, branches and bodies of Scan too. What the file itself
says of a value in between counts only where nothing can be derived: exporters write down the example's sizes, and
runtimes do not mind. Types are taken from the file, which no runtime would run if they were wrong.

A node on which inference fails is passed over. What comes after it stays unknown, and no rule matches there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY, OpUsageError, ShapeInferenceError, infer_symbolic_shapes

from mmdit_deploy.graph.function_types import callers_first, type_function_inputs
from mmdit_deploy.graph.fuse.shape_rules import simplified, teach
from mmdit_deploy.graph.named_functions import is_named_function
from mmdit_deploy.graph.passes import Pass

_OPAQUE = "mmdit.opaque"  # a domain of which inference knows nothing
_TRIES = 16  # nodes, or ops, that may fail in one scope before what the file says has to do
_MINTED = re.compile(r"_d\d+")  # how inference calls dims of which it knows nothing
_LONGEST = 300  # characters of an expression that is worth simplifying

_Scope = ir.Graph | ir.Function
_Dim = int | ir.SymbolicDim


def infer_shapes(model: ir.Model) -> int:
    """Derive the shapes of a graph and of its functions, as their calls have them.

    Returns:
        How many values got a shape that had none.
    """
    teach()
    functions = list(model.functions.values())
    theirs = [f for f in functions if not is_named_function(f)]  # ours serve every type and shape
    values = [*_values(model.graph), *(v for f in theirs for v in (*f.inputs, *_values(f)))]
    unknown = [v for v in values if v.shape is None]
    _infer_scope(model.graph, model, functions)
    for function in theirs:
        for value in function.inputs:
            value.shape = None
    order = [name for name in callers_first(model) if not is_named_function(model.functions[name])]
    type_function_inputs(model, order, then=lambda function: _infer_scope(function, model, functions))
    return sum(v.shape is not None for v in unknown)


def _infer_scope(scope: _Scope, model: ir.Model, functions: list[ir.Function]) -> None:
    """Derive, and go back to what the file says where that fails."""
    values = list(_values(scope))
    declared = [v.shape for v in values]
    graph = scope.graph if isinstance(scope, ir.Function) else scope
    view = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    nodes = list(scope.all_nodes())
    opaque = {node for node in nodes if _is_beyond_inference(node)}
    for _ in range(_TRIES):
        _forget(values)
        failed = _derive(view, nodes, opaque)
        if failed is None:
            known = _symbols(scope, nodes)
            for value, shape in zip(values, declared, strict=True):
                value.shape = _merged(shape, value.shape, known)
            break
        more = failed - opaque
        if not more:
            break
        # An op that failed twice fails everywhere.
        again = {n.op_identifier() for n in more} & {n.op_identifier() for n in opaque}
        opaque |= more | {n for n in nodes if n.op_identifier() in again}
    else:
        failed = set()
    if failed is not None:
        _forget(values)
        for value, shape in zip(values, declared, strict=True):
            value.shape = shape


def _values(scope: _Scope) -> Iterator[ir.Value]:
    """What its nodes make, those of its branches and loop bodies too."""
    for node in scope.all_nodes():
        yield from node.outputs


def _is_beyond_inference(node: ir.Node) -> bool:
    """A value that a Loop carries may change its shape from turn to turn; a function's attributes vary by call."""
    return (node.op_type == "Loop" and node.domain == "") or any(a.is_ref() for a in node.attributes.values())


def _forget(values: Iterable[ir.Value]) -> None:
    for value in values:
        producer = value.producer()
        if producer is None or producer.op_type != "Constant":
            value.const_value = None
        value.shape = None
        value.metadata_props.pop(SYM_DATA_KEY, None)


def _derive(view: ir.Model, nodes: list[ir.Node], opaque: set[ir.Node]) -> set[ir.Node] | None:
    """Run inference once.

    Returns:
        None when all went well, else the nodes that are to be passed over; none of them where that is not known.
    """
    names = [(node, node.name, node.domain) for node in nodes]
    for i, node in enumerate(nodes):
        node.name = f"#{i}"  # what an error calls it
        if node in opaque:
            node.domain = _OPAQUE
    try:
        infer_symbolic_shapes(view, warn_on_missing=False)
    except OpUsageError as error:
        return {error.node} & set(nodes)
    except ShapeInferenceError as error:
        return (
            {nodes[int(error.node_name[1:])]} if (error.node_name or "").startswith("#") and error.node_name else set()
        )
    except Exception:  # a malformed node, a dim's name that is no expression, recursion: whatever it runs into
        return set()
    finally:
        for node, name, domain in names:
            node.name, node.domain = name, domain
    return {node for node in nodes if node not in opaque and _guesses(node)} or None


def _guesses(node: ir.Node) -> bool:
    """An If of which one branch is not known was given the shape of the other."""
    if node.op_type != "If" or node.domain != "":
        return False
    branches = [a.as_graph().outputs for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return any(
        out.shape is not None and any(branch[i].shape is None for branch in branches if i < len(branch))
        for i, out in enumerate(node.outputs)
    )


def _symbols(scope: _Scope, nodes: Iterable[ir.Node]) -> frozenset[str]:
    """Symbols that mean something: those of inputs, and of the inputs of branches and bodies."""
    inputs = list(scope.inputs)
    for node in nodes:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                inputs.extend(attribute.as_graph().inputs)
    dims = [dim for value in inputs if value.shape is not None for dim in value.shape]
    return frozenset(s for dim in dims if isinstance(dim, ir.SymbolicDim) for s in _free(dim))


def _free(dim: ir.SymbolicDim) -> frozenset[str]:
    try:
        return dim.free_symbols()
    except ValueError:
        return frozenset({dim.value or ""})  # a name that is no expression: by itself it is a symbol


def _merged(declared: ir.Shape | None, derived: ir.Shape | None, known: frozenset[str]) -> ir.Shape | None:
    """What was derived, but for dims of which only the file says something."""
    if derived is None:
        return declared
    dims = [_simplest(dim) for dim in derived]
    if declared is not None and len(declared) == len(dims):
        dims = [_better(said, dim, known) for said, dim in zip(declared, dims, strict=True)]
    return ir.Shape(dims)


def _better(declared: _Dim, derived: _Dim, known: frozenset[str]) -> _Dim:
    if isinstance(derived, int) or (derived.value is not None and _free(derived) <= known):
        return derived
    says_nothing = isinstance(declared, ir.SymbolicDim) and (
        declared.value is None or _MINTED.fullmatch(declared.value) is not None
    )
    return derived if says_nothing else declared


def _simplest(dim: _Dim) -> _Dim:
    """Every expression in one form, so that equal ones compare equal: floor(64·s·(n + 48)/(16·n + 768)) is 4·s."""
    text = None if isinstance(dim, int) else dim.value
    if text is not None and text.isdecimal():
        return int(text)
    if text is None or "(" not in text or len(text) > _LONGEST:
        return dim
    try:
        return simplified(text)
    except ValueError:
        return dim  # a name that is no expression


shapes: Pass = Pass("shapes", infer_shapes)
