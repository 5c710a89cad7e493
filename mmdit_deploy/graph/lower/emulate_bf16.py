"""bf16 on a runtime without bf16 kernels: fp32 ops, with every result rounded through bf16.

    op(bf16) → bf16   ⇒   op(fp32) → Cast(bf16) → Cast(fp32)

Right for judging numerics (each op accumulates in fp32 and rounds once, as GPU kernels do), useless for speed. ONNX
Runtime keeps such pairs of casts through all its optimizations. Ops that only move data need no rounding.
"""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.graph.passes import Pass

MOVES_DATA = frozenset("Concat Expand Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split())


def _emulate(model: ir.Model) -> int:
    functions = {f.identifier() for f in model.functions.values()}
    count = sum(_emulate_body(f, functions) for f in model.functions.values())
    for function in model.functions.values():
        for value in function.inputs:
            _widen(value)
    return count + _emulate_graph(model.graph, functions)


def _emulate_body(body: ir.Graph | ir.Function, functions: set[tuple[str, str, str]]) -> int:
    count = 0
    for node in list(body):
        if node.op_type == "Constant" and node.outputs[0].dtype == ir.DataType.BFLOAT16:
            value = node.attributes["value"].as_tensor()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.numpy().astype("float32")))
            _widen(node.outputs[0])
            count += 1
            continue
        rounds = node.op_type not in MOVES_DATA and node.op_identifier() not in functions
        for out in node.outputs:
            if out.dtype != ir.DataType.BFLOAT16 or _is_rounding(body, node):
                continue
            if node.op_type == "Cast":  # Cast(to=bf16) is the rounding itself
                _append_casts(body, node, out, (ir.DataType.FLOAT,))
            else:
                _widen(out)
                if rounds:
                    _append_casts(body, node, out, (ir.DataType.BFLOAT16, ir.DataType.FLOAT))
            count += 1
    return count


def _emulate_graph(graph: ir.Graph, functions: set[tuple[str, str, str]]) -> int:
    """The top level: bf16 stays at the graph's edge and in the weights file, fp32 flows between calls."""
    is_narrow = [v.dtype == ir.DataType.BFLOAT16 for v in graph.outputs]
    count = _emulate_body(graph, functions)
    for value in [*graph.inputs, *graph.initializers.values()]:
        if value.dtype == ir.DataType.BFLOAT16 and not _only_widened(value):
            uses = list(value.uses())
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
            wide = cast.outputs[0]
            wide.name, wide.shape, wide.type = (
                f"{value.name}.fp32",
                value.shape,
                ir.TensorType(ir.DataType.FLOAT),
            )
            for node, index in uses:
                node.replace_input_with(index, wide)
            graph.insert_before(graph[0], cast)
            count += 1
    for i, value in enumerate(graph.outputs):
        if is_narrow[i] and value.dtype == ir.DataType.FLOAT:
            name, value.name = value.name, f"{value.name}.fp32"
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.BFLOAT16})
            narrow = cast.outputs[0]
            narrow.name, narrow.shape, narrow.type = name, value.shape, ir.TensorType(ir.DataType.BFLOAT16)
            graph.append(cast)
            graph.outputs[i] = narrow
            count += 1
    return count


def _is_rounding(body: ir.Graph | ir.Function, node: ir.Node) -> bool:
    """Whether a node is a Cast(to=bf16) that nobody reads in bf16, but for the caller of the whole graph."""
    if node.op_type != "Cast" or not _only_widened(node.outputs[0]):
        return False
    return isinstance(body, ir.Graph) or node.outputs[0] not in body.outputs


def _only_widened(value: ir.Value) -> bool:
    """Whether every reader of a bf16 value is a Cast(to=fp32)."""
    return all(
        node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT for node, _ in value.uses()
    )


def _append_casts(body: ir.Graph | ir.Function, node: ir.Node, out: ir.Value, types: tuple[ir.DataType, ...]) -> None:
    """Let every reader of `out`, and the body's outputs, read it through a chain of casts."""
    uses, last, last_node = list(out.uses()), out, node
    for type_ in types:
        cast = ir.node("Cast", [last], attributes={"to": type_})
        last = cast.outputs[0]
        last.name = f"{out.name}.{type_.short_name()}"
        last.shape, last.type = out.shape, ir.TensorType(type_)
        body.insert_after(last_node, cast)
        last_node = cast
    for user, index in uses:
        user.replace_input_with(index, last)
    outputs = body.outputs
    for i, value in enumerate(outputs):
        if value is out:
            name = out.name
            out.name, last.name = f"{name}.exact", name
            outputs[i] = last


def _widen(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.type = ir.TensorType(ir.DataType.FLOAT)


emulate_bf16 = Pass("bf16 emulation", _emulate)
