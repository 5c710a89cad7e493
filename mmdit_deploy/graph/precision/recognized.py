"""Which scheme a product of a graph is quantized by: read back from the nodes, not from what made them.

x ─ QuantizeLinear(E4M3, one scale) ─ DequantizeLinear ─┐
                                                        MatMul   ⇒   fp8
w (E4M3) ─ DequantizeLinear ─ Transpose ────────────────┘
"""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.precision import SCHEMES

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_FORMATS = {
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT4E2M1: "fp4",
    ir.DataType.INT4: "int4",
}
_LOOKED_THROUGH = frozenset({"Cast", "Transpose"})
_AFTER = frozenset({"Mul", "Add", "Reshape", "Split"})
# Smoothing is a product before; by these alone a layer with it looks like one without.
_BY_FORMAT = {(s.weights, s.activations): s.name for s in SCHEMES.values()}


def scheme_of(node: ir.Node) -> str | None:
    """The scheme of a product; None where its second factor is no dequantized weight.

    Quantized in a way that is none of ours, it is called ``mixed``.
    """
    if node.op_type not in PRODUCTS or len(node.inputs) < 2:
        return None
    weight = _dequantize(node.inputs[1])
    stored = weight.inputs[0] if weight is not None else None
    if weight is None or stored is None or stored.producer() is not None:
        return None
    activation = _dequantize(node.inputs[0])
    return _BY_FORMAT.get((_FORMATS.get(stored.dtype, ""), _sharing(activation)), "mixed")  # type: ignore[arg-type]


def products_joined(node: ir.Node) -> int:
    """How many products a product was made of: those of modulations are one, whose result is split."""
    value = node.outputs[0]
    while len(users := [user for user, _ in value.uses()]) == 1 and users[0].op_type in _AFTER:
        if users[0].op_type == "Split":
            return len(users[0].outputs) if ".." in (node.name or "") else 1
        value = users[0].outputs[0]
    return 1


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _LOOKED_THROUGH and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _sharing(dequantize: ir.Node | None) -> str:
    """What shares a scale of the input, as `Scheme.activations` has it."""
    if dequantize is None:
        return "none"
    coded = dequantize.inputs[0]
    quantize = coded.producer() if coded is not None else None
    if (
        quantize is None
        or quantize.op_type != "QuantizeLinear"
        or not _same_scale(quantize.inputs[1], dequantize.inputs[1])
    ):
        return "another scale"
    if dequantize.attributes.get_int("block_size", 0):
        return "block"
    # What has been divided by its token's largest has a constant scale, a calibrated one is an input.
    scale = _before_casts(quantize.inputs[1])
    return "tensor" if scale is None or scale.producer() is None else "token"


def _same_scale(one: ir.Value | None, other: ir.Value | None) -> bool:
    """One value, or equal constants: of what is rounded in 16 bit and read in fp32 there is one in each type."""
    one, other = _before_casts(one), _before_casts(other)
    if one is other:
        return True
    tensors = [ir.convenience.get_const_tensor(value) for value in (one, other) if value is not None]
    numbers = [float(t.numpy()) for t in tensors if t is not None and t.size == 1]
    return len(numbers) == 2 and numbers[0] == numbers[1]


def _before_casts(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_type == "Cast":
        value = node.inputs[0]
    return value
