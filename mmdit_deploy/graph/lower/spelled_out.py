"""Named functions as the nodes that they are made of, with types and shapes.

    [m] MMDiTGatedResidual(x, gate, y)   ⇒   [m/added] Add(x, [m/gated] Mul(gate, y))

For dialects that change every op. Runtimes inline functions themselves: ONNX Runtime before it optimizes, and TensorRT
makes the same kernels of both (51 of two SD3 blocks, 100 of a tiny FLUX.2). A constant that is cast to what it meets
becomes a constant of that type.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from mmdit_deploy.graph.named_functions import define, definition, is_named_function
from mmdit_deploy.graph.passes import Pass


def _spell_out(model: ir.Model) -> int:
    names = {f.identifier() for f in model.functions.values() if is_named_function(f)}
    scopes: list[ir.Graph | ir.Function] = [
        model.graph,
        *(f for f in model.functions.values() if not is_named_function(f)),
    ]
    calls = [node for scope in scopes for node in scope.all_nodes() if node.op_identifier() in names]
    for call in calls:
        _inline(call)
    define(model)  # which drops what is no longer called
    return len(calls)


def _inline(call: ir.Node) -> None:
    body = definition(call.op_type)
    result = call.outputs[0]
    values: dict[ir.Value | None, ir.Value | None] = dict(zip(body.inputs, call.inputs, strict=True))
    nodes = []
    for template in body:
        inputs, attributes = [values[v] for v in template.inputs], dict(template.attributes)
        op_type = template.op_type
        if op_type == "CastLike" and result.dtype is not None:
            op_type, attributes = "Constant", {"value": _cast(template.inputs[0], result.dtype)}
            inputs = []
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{call.name or result.name}/{template.name}")
        made, value = node.outputs[0], template.outputs[0]
        made.name = f"{result.name}.{value.name}"
        if template.op_type != "Constant":  # which is of no type of the call's
            made.type, made.shape = result.type, _broadcast(inputs)
        values[value] = made
        nodes.append(node)
    used = {value for node in nodes for value in node.inputs} | {values[body.outputs[0]]}
    nodes = [node for node in nodes if node.outputs[0] in used]
    graph, last = call.graph, values[body.outputs[0]]
    assert graph is not None and last is not None
    ir.convenience.replace_nodes_and_values(graph, call, [call], nodes, [result], [last])


def _cast(constant: ir.Value | None, dtype: ir.DataType) -> ir.Attr:
    node = constant.producer() if constant is not None else None
    assert node is not None
    return ir.AttrTensor("value", ir.tensor(node.attributes["value_float"].as_float(), dtype=dtype))


def _broadcast(values: Iterable[ir.Value | None]) -> ir.Shape | None:
    """The shape of an elementwise op's result."""
    shapes = [value.shape for value in values if value is not None]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    rank = max((len(shape) for shape in known), default=0)
    ones: list[int | ir.SymbolicDim] = [1] * rank
    aligned = zip(*([*ones[len(shape) :], *shape] for shape in known), strict=True)
    return ir.Shape([next((dim for dim in dims if dim != 1), 1) for dims in aligned])


spelled_out: Pass = Pass("named functions spelled out", _spell_out)
