"""A linear layer of a function, quantized: what `mmdit_deploy.precision.schemes` says, as nodes.

    MatMul(x, Transpose(w)) ─ Add(b)        x ─ QuantizeLinear ─ DequantizeLinear ─┐
    Gemm(x, w, b, transB=1)            ⇒                                           MatMul ─ Mul(c) ─ Add(b)
                                            w ─ DequantizeLinear ─ Transpose ──────┘

TensorRT folds Quantize and Dequantize into the product, which then reads E4M3, INT8 or E2M1; other runtimes compute the
same numbers in the compute type. The weight is dequantized as it is stored and transposed afterwards: nothing but
DequantizeLinear may read a constant in FP8 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.named_functions import SHARED
from mmdit_deploy.graph.precision.spelling import Dims, Spelling, dims_of, sizes_of
from mmdit_deploy.precision import Scheme, Stored, stored
from mmdit_deploy.precision.formats import LARGEST
from mmdit_deploy.precision.quantize import LEAST_E4M3, LEAST_SCALE

_TYPES = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8, "fp4": ir.DataType.FLOAT4E2M1}


@dataclass(frozen=True)
class _Product:
    """A linear layer before: what it reads, and the nodes that make it, the last one first.

    Args:
        bias: where the product adds it itself.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]


def quantize_linear(function: ir.Function, linear: str, scheme: Scheme, compute: torch.dtype) -> tuple[Stored, ...]:
    """Quantize one linear layer of a function, in place.

    The function's weight gets its new type, and the other tensors become its last inputs, as ``<linear>.<name>``.

    Args:
        linear: its path in the function, e.g. ``img.qkv.proj``.

    Returns:
        The tensors that it is stored as, its weight first.

    Raises:
        GraphError: the function has no such layer, or it is spelled in another way.
    """
    product = _product(function, linear)
    rows, columns = sizes_of(product.weight)
    tensors = stored(scheme, rows, columns, compute)
    product.weight.type = ir.TensorType(ir.DataType[tensors[0].onnx])
    given = {"weight": product.weight}
    for tensor in tensors[1:]:
        value = ir.Value(
            name=f"{linear}.{tensor.name}",
            type=ir.TensorType(ir.DataType[tensor.onnx]),
            shape=ir.Shape(tensor.logical),
        )
        function.inputs.append(value)
        given[tensor.name] = value
    if scheme.weights == "fp8" and scheme.activations == "none":  # one scale in all layers
        shared = function.metadata_props.get(SHARED, "").split()
        function.metadata_props[SHARED] = " ".join([*shared, f"{linear}.weight_scale"])
    spelling = _Linear(linear, scheme, given, product)
    made = spelling.output()
    first = product.nodes[0]
    ir.convenience.replace_nodes_and_values(
        function, first, product.nodes, spelling.add.nodes, [first.outputs[0]], [made]
    )
    return tensors


class _Linear:
    """The nodes of one quantized layer."""

    def __init__(self, linear: str, scheme: Scheme, tensors: dict[str, ir.Value], product: _Product):
        self.add = Spelling(linear)
        self._scheme, self._tensors, self._product = scheme, tensors, product
        dtype = product.x.dtype
        assert dtype is not None
        self._compute = dtype

    def output(self) -> ir.Value:
        """x · Wᵀ · c + b, where the product added b itself."""
        (x, peak), scheme = self._input(), self._scheme
        weight = self._weight()
        rows, columns = sizes_of(weight)
        transposed = self.add("Transpose", [weight], "weight.transposed", self._compute, [columns, rows], perm=[1, 0])
        dims: Dims = [*dims_of(x)[:-1], rows]
        made = self.add("MatMul", [x, transposed], "product", self._compute, dims)
        node = made.producer()
        assert node is not None
        node.name = self._product.nodes[0].name  # which engines call their kernels after
        if not scheme.block:  # first: a channel's factor is small, and a token's peak may not fit without it
            made = self.add("Mul", [made, self._tensors["channel_scale"]], "by_channel", self._compute, dims)
        if peak is not None:
            made = self.add("Mul", [made, peak], "by_token", self._compute, dims)
        if self._product.bias is not None:
            made = self.add("Add", [made, self._product.bias], "biased", self._compute, dims)
        return made

    def _weight(self) -> ir.Value:
        """Dequantized, [out, in]."""
        weight, scale, block = self._tensors["weight"], self._tensors["weight_scale"], self._scheme.block
        dims = dims_of(weight)
        if self._scheme.weights == "fp4":
            second = self._tensors["weight_scale_2"]
            scales = self.add("DequantizeLinear", [scale, second], "weight_scale.dequantize", _FP32, dims_of(scale))
            wide = self.add(
                "DequantizeLinear", [weight, scales], "weight.dequantize", _FP32, dims, axis=1, block_size=block
            )
            return self._narrow(wide, "weight")
        attributes = {"axis": 1, "block_size": block} if block else {}
        return self.add("DequantizeLinear", [weight, scale], "weight.dequantize", self._compute, dims, **attributes)

    def _input(self) -> tuple[ir.Value, ir.Value | None]:
        """Smoothed, quantized and dequantized, as far as the scheme does it; and what the product is still to be
        multiplied by.
        """
        x, scheme = self._product.x, self._scheme
        dims = dims_of(x)
        if scheme.smooth:
            x = self.add("Mul", [x, self._tensors["pre_quant_scale"]], "smoothed", self._compute, dims)
        if scheme.activations == "none":
            return x, None
        if scheme.activations == "tensor":
            return self._quantized(x, self._tensors["input_scale"]), None
        if scheme.activations == "block":
            return self._quantized(x, self._block_scale(x), axis=-1, block_size=scheme.block), None
        # Each token is divided by its largest: TensorRT wants a constant scale.
        peak = self._peak(x)
        x = self.add("Div", [x, peak], "by_peak", self._compute, dims)
        scale = self.add.number(1 / LARGEST[scheme.weights], "input_scale", self._compute)
        return self._quantized(x, scale), peak

    def _quantized(self, x: ir.Value, scale: ir.Value, **attributes: int | None) -> ir.Value:
        """x through the scheme's format and back."""
        form, dims = _TYPES[self._scheme.weights], dims_of(x)
        narrow = self.add("QuantizeLinear", [x, scale], "quantize", form, dims, output_dtype=form, **attributes)
        return self.add("DequantizeLinear", [narrow, scale], "dequantize", self._compute, dims, **attributes)

    def _peak(self, x: ir.Value) -> ir.Value:
        """Of each token its largest magnitude; of one of zeros a number that can be divided by."""
        compute, dims = self._compute, dims_of(x)
        size = self.add("Abs", [x], "size", compute, dims)
        channels = self.add.ints([-1], "channels")
        largest = self.add("ReduceMax", [size, channels], "largest", compute, [*dims[:-1], 1], keepdims=1)
        least = self.add.number(LEAST_SCALE, "least", compute)
        return self.add("Max", [largest, least], "peak", compute, [*dims[:-1], 1])

    def _block_scale(self, x: ir.Value) -> ir.Value:
        """NVFP4's scales of an input's blocks: E4M3 times one number, found in fp32; none of them is zero."""
        compute, dims, block = self._compute, dims_of(x), self._scheme.block
        columns = dims[-1]
        assert isinstance(columns, int) and block is not None
        per_block = [*dims[:-1], columns // block]
        second = self._tensors["input_scale"]
        shape = self.add.ints([0] * (len(dims) - 1) + [columns // block, block], "block_shape")
        blocks = self.add("Reshape", [x, shape], "blocks", compute, [*per_block, block])
        size = self.add("Abs", [blocks], "size", compute, [*per_block, block])
        in_block = self.add.ints([-1], "in_block")
        largest = self.add("ReduceMax", [size, in_block], "largest", compute, per_block, keepdims=0)
        if compute != _FP32:
            largest = self.add("Cast", [largest], "largest.fp32", _FP32, per_block, to=_FP32)
        six = self.add.number(LARGEST["fp4"], "format_largest", _FP32)
        raw = self.add("Div", [largest, six], "raw_scale", _FP32, per_block)
        e4m3 = self.add.number(LEAST_E4M3, "least_e4m3", _FP32)
        floor = self.add("Mul", [second, e4m3], "least_scale", _FP32, [])
        least = self.add.number(LEAST_SCALE, "least", _FP32)
        safe = self.add("Max", [raw, floor, least], "safe_scale", _FP32, per_block)
        form = _TYPES["fp8"]
        coded = self.add("QuantizeLinear", [safe, second], "scale.quantize", form, per_block, output_dtype=form)
        scale = self.add("DequantizeLinear", [coded, second], "scale.dequantize", _FP32, per_block)
        return self._narrow(scale, "scale")

    def _narrow(self, value: ir.Value, name: str) -> ir.Value:
        if value.dtype == self._compute:
            return value
        return self.add("Cast", [value], f"{name}.narrow", self._compute, dims_of(value), to=self._compute)


_FP32 = ir.DataType.FLOAT


def _product(function: ir.Function, linear: str) -> _Product:
    """The layer as tracing spells it.

    Raises:
        GraphError: the function has no such layer, or it is spelled in another way.
    """
    weight = next((v for v in function.inputs if v.name == f"{linear}.weight"), None)
    users = [] if weight is None else [node for node, _ in weight.uses()]
    transpose = users[0] if len(users) == 1 and users[0].op_type == "Transpose" else None
    if transpose is not None:
        users = [node for node, _ in transpose.outputs[0].uses()]
    found = users[0] if len(users) == 1 else None
    if weight is None or found is None or found.inputs[0] is None:
        raise _not_linear(function, linear, [node.op_type for node in users])
    if found.op_type == "MatMul" and transpose is not None and found.inputs[1] is transpose.outputs[0]:
        return _Product(found.inputs[0], weight, None, (found, transpose))
    if found.op_type == "Gemm" and transpose is None and _is_plain(found):
        bias = found.inputs[2] if len(found.inputs) > 2 else None
        return _Product(found.inputs[0], weight, bias, (found,))
    raise _not_linear(function, linear, [found.op_type])


def _is_plain(gemm: ir.Node) -> bool:
    expected = {"transB": 1.0, "transA": 0.0, "alpha": 1.0, "beta": 1.0}
    return "transB" in gemm.attributes and all(
        not a.is_ref() and float(a.value) == expected.get(name) for name, a in gemm.attributes.items()
    )


def _not_linear(function: ir.Function, linear: str, found: list[str]) -> GraphError:
    return GraphError(
        f"a layer that is quantized is one product of {function.name} with {linear}.weight",
        received=f"its weight is read by {', '.join(found) or 'nothing'}",
        fix="report this as a bug, with torch's version",
    )


__all__ = ["quantize_linear"]
