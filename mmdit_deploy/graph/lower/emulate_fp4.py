"""FP4 on a runtime that cannot compute with it: plain ops on the same bytes of the weights file.

    DequantizeLinear(w FLOAT4E2M1 [out, in], s)   ⇒   E2M1's values[w UINT8 [out, in / 2], low half and high half] · s

    x ─ QuantizeLinear ─ DequantizeLinear         ⇒   x / s, clipped to ±6, rounded half to even to E2M1's steps, · s
        (blocks of scales s)

The weights are equal to the bit, and so are the inputs, which are computed in fp32 as QuantizeLinear does. The scales
of inputs' blocks are quantized to E4M3 by ONNX's own ops, as they were.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from mmdit_deploy.graph.passes import Pass
from mmdit_deploy.graph.precision.spelling import Spelling, dims_of, sizes_of

FP32, FP4, BYTES = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.UINT8
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _emulate(model: ir.Model) -> int:
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    count = sum(_emulate_nodes(scope) for scope in scopes)
    for value in [*(v for scope in scopes for v in scope.inputs), *model.graph.initializers.values()]:
        if value.dtype == FP4:
            _as_bytes(value)
    return count


def _emulate_nodes(scope: ir.Graph | ir.Function) -> int:
    count = 0
    for node in list(scope):
        coded = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if coded is None or coded.dtype != FP4:
            continue
        quantize = coded.producer()
        spelling = Spelling(node.name or f"{node.outputs[0].name}")
        made = _weight(node, spelling) if quantize is None else _activation(quantize, node, spelling)
        ir.convenience.replace_nodes_and_values(scope, node, [node], spelling.nodes, list(node.outputs), [made])
        if quantize is not None and not coded.uses():
            scope.remove(quantize, safe=True)
        count += 1
    return count


def _weight(node: ir.Node, add: Spelling) -> ir.Value:
    """Its values times their blocks' scales, [out, in]."""
    coded, scale = node.inputs[0], node.inputs[1]
    assert coded is not None and scale is not None
    rows, columns = sizes_of(coded)
    block = node.attributes["block_size"].as_int()
    half, last = [rows, columns // 2], add.ints([-1], "last")
    mask, bits = (add("Constant", [], name, BYTES, [], value=ir.tensor(n, dtype=BYTES)) for name, n in _HALVES)
    parts = (
        add("BitwiseAnd", [coded, mask], "low", BYTES, half),
        add("BitShift", [coded, bits], "high", BYTES, half, direction="RIGHT"),
    )
    pairs = [
        add("Unsqueeze", [v, last], f"{name}.pair", BYTES, [*half, 1]) for v, name in zip(parts, "lh", strict=True)
    ]
    codes = add("Concat", pairs, "codes", BYTES, [*half, 2], axis=-1)
    by_block = [rows, columns // block, block]
    blocks = add("Reshape", [codes, add.ints(by_block, "by_block")], "blocks", BYTES, by_block)
    index = add("Cast", [blocks], "index", ir.DataType.INT32, by_block, to=ir.DataType.INT32)
    table = ir.tensor([*E2M1, *(-v for v in E2M1)], dtype=FP32)
    values = add("Gather", [add("Constant", [], "e2m1", FP32, [16], value=table), index], "values", FP32, by_block)
    return _scaled(values, scale, node.outputs[0], add)


def _activation(quantize: ir.Node, dequantize: ir.Node, add: Spelling) -> ir.Value:
    """x rounded to E2M1 in blocks."""
    x, scale = quantize.inputs[0], quantize.inputs[1]
    assert x is not None and scale is not None
    block, dims = quantize.attributes["block_size"].as_int(), dims_of(x)
    assert isinstance(dims[-1], int)
    by_block = [*dims[:-1], dims[-1] // block, block]
    sizes = add.ints([0] * (len(dims) - 1) + [dims[-1] // block, block], "by_block")
    blocks = add("Reshape", [_wide(x, "x", add), sizes], "blocks", FP32, by_block)
    per_block = _per_block(scale, add)
    raw = add("Div", [blocks, per_block], "raw", FP32, by_block)
    most, least = add.number(E2M1[-1], "most", FP32), add.number(-E2M1[-1], "least", FP32)
    clipped = add("Clip", [raw, least, most], "clipped", FP32, by_block)
    # Steps of ½ below 2, of 1 up to 4, of 2 beyond: what rounds up to 2 or 4 is a multiple of the larger step too.
    size = add("Abs", [clipped], "size", FP32, by_block)
    small = add("Less", [size, add.number(2.0, "two", FP32)], "small", ir.DataType.BOOL, by_block)
    large = add("Greater", [size, add.number(4.0, "four", FP32)], "large", ir.DataType.BOOL, by_block)
    steps = [add.number(step, f"step_{name}", FP32) for step, name in ((2.0, "large"), (1.0, "middle"), (0.5, "small"))]
    step = add("Where", [large, steps[0], steps[1]], "from_2", FP32, by_block)
    step = add("Where", [small, steps[2], step], "step", FP32, by_block)
    count = add("Round", [add("Div", [clipped, step], "steps", FP32, by_block)], "rounded", FP32, by_block)
    values = add("Mul", [count, step], "values", FP32, by_block)
    return _scaled(values, scale, dequantize.outputs[0], add, per_block)


def _scaled(
    values: ir.Value, scale: ir.Value, like: ir.Value, add: Spelling, per_block: ir.Value | None = None
) -> ir.Value:
    """Values [..., blocks, block] times their blocks' scales, in the shape and type of what they stand for."""
    dims, dtype = dims_of(like), like.dtype
    assert dtype is not None and isinstance(dims[-1], int)
    per_block = per_block or _per_block(scale, add)
    scaled = add("Mul", [values, per_block], "scaled", FP32, dims_of(values))
    joined = add("Reshape", [scaled, add.ints([0] * (len(dims) - 1) + [dims[-1]], "joined")], "wide", FP32, dims)
    return joined if dtype == FP32 else add("Cast", [joined], "narrow", dtype, dims, to=dtype)


def _per_block(scale: ir.Value, add: Spelling) -> ir.Value:
    wide = _wide(scale, "scale", add)
    return add("Unsqueeze", [wide, add.ints([-1], "in_block")], "per_block", FP32, [*dims_of(scale), 1])


def _wide(value: ir.Value, name: str, add: Spelling) -> ir.Value:
    if value.dtype == FP32:
        return value
    return add("Cast", [value], f"{name}.fp32", FP32, dims_of(value), to=FP32)


_HALVES = (("mask", 15), ("bits", 4))


def _as_bytes(value: ir.Value) -> None:
    """A weight as the bytes that lie in the file."""
    *rest, columns = sizes_of(value)
    value.shape, value.type = ir.Shape([*rest, columns // 2]), ir.TensorType(BYTES)
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            math.prod([*rest, columns // 2]),
            BYTES,
            shape=value.shape,
            name=value.name or "",
            base_dir=tensor.base_dir,
        )


emulate_fp4 = Pass("FP4 emulation", _emulate)
