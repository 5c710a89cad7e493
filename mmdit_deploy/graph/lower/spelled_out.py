"""Named functions as the nodes that they are made of, with types and shapes.

    [m] MMDiTGatedResidual(x, gate, y)   ⇒   [m/added] Add(x, [m/gated] Mul(gate, y))

For dialects that change every op. Runtimes inline functions themselves: ONNX Runtime before it optimizes, and TensorRT
makes the same kernels of both (51 of two SD3 blocks, 100 of a tiny FLUX.2). A constant that is cast to what it meets
becomes a constant of that type.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable

import onnx_ir as ir

from mmdit_deploy.graph.named_functions import (
    FP8_ATTENTIONS,
    NAMED_FUNCTIONS,
    define,
    definition,
    is_named_function,
)
from mmdit_deploy.graph.passes import Pass


def _spell_out(model: ir.Model, names: Collection[str]) -> int:
    keys = {f.identifier() for f in model.functions.values() if is_named_function(f) and f.name in names}
    scopes: list[ir.Graph | ir.Function] = [
        model.graph,
        *(f for f in model.functions.values() if not is_named_function(f)),
    ]
    calls = [node for scope in scopes for node in scope.all_nodes() if node.op_identifier() in keys]
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
        inputs, attributes = [values[v] for v in template.inputs], _given(template, call)
        op_type = template.op_type
        if op_type == "CastLike" and result.dtype is not None:
            op_type, attributes = "Constant", {"value": _cast(template.inputs[0], call, result.dtype)}
            inputs = []
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{call.name or result.name}/{template.name}")
        made, value = node.outputs[0], template.outputs[0]
        made.name = f"{result.name}.{value.name}"
        _type(node, result.dtype)
        values[value] = made
        nodes.append(node)
    used = {value for node in nodes for value in node.inputs} | {values[body.outputs[0]]}
    nodes = [node for node in nodes if node.outputs[0] in used]
    graph, last = call.graph, values[body.outputs[0]]
    assert graph is not None and last is not None
    ir.convenience.replace_nodes_and_values(graph, call, [call], nodes, [result], [last])


def _given(template: ir.Node, call: ir.Node) -> dict[str, ir.Attr]:
    """A node's attributes; those that the call gives as it gives them."""
    return {
        name: attribute
        if (given := attribute.ref_attr_name) is None
        else ir.Attr(name, attribute.type, call.attributes[given].value)
        for name, attribute in template.attributes.items()
    }


def _cast(constant: ir.Value | None, call: ir.Node, dtype: ir.DataType) -> ir.Attr:
    node = constant.producer() if constant is not None else None
    assert node is not None
    return ir.AttrTensor("value", ir.tensor(_given(node, call)["value_float"].as_float(), dtype=dtype))


def _type(node: ir.Node, dtype: ir.DataType | None) -> None:
    """Say what a node of a named function makes, whose result is of that type."""
    made = node.outputs[0]
    if node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(made)
        if tensor is not None:
            made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.numpy().shape)
        return
    if node.op_type == "QuantizeLinear":
        dtype = ir.DataType(node.attributes["output_dtype"].as_int())
    made.type = None if dtype is None else ir.TensorType(dtype)
    made.shape = _shape(node)


def _shape(node: ir.Node) -> ir.Shape | None:
    x = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Softmax"):
        return x
    if node.op_type == "Transpose" and x is not None:
        return ir.Shape([x[axis] for axis in node.attributes["perm"].as_ints()])
    if node.op_type == "Reshape" and x is not None:
        sizes = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        return None if sizes is None else ir.Shape([n or x[i] for i, n in enumerate(sizes.numpy().tolist())])
    if node.op_type == "MatMul" and x is not None:
        y = node.inputs[1].shape if node.inputs[1] is not None else None
        return None if y is None else ir.Shape([*list(x)[:-1], y[-1]])
    return _broadcast(node.inputs)


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


spelled_out: Pass = Pass("named functions spelled out", functools.partial(_spell_out, names=NAMED_FUNCTIONS))
# TensorRT fuses it so; the other named functions it reads as they are.
fp8_attention_spelled_out: Pass = Pass("FP8 attention spelled out", functools.partial(_spell_out, names=FP8_ATTENTIONS))
