"""Calls of functions that are one linear layer: what `batched_modulation` joins.

    Unsqueeze(Gemm(x, w, b, transB=1), 1)
    Unsqueeze(Add(Mul(MatMul(x, Transpose(DequantizeLinear(w, s))), c), b), 1)

Without b, or without c, too. A scale s has a row for each of w's, or is one number that is the same in all calls: a
function says so of its input in its metadata, as `SHARED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mmdit_deploy.graph.named_functions import SHARED


@dataclass(frozen=True)
class Projection:
    """One call.

    Args:
        tensors: what lies in a file and has as many rows as the product has columns: ``weight``, and as far as there
            are some ``scale`` (of blocks), ``channel`` and ``bias``.
        shared: a scale that is one number.
        block: how many of a row's weights share a scale; 0 where they all do, None of weights that are not quantized.
    """

    node: ir.Node
    x: ir.Value
    tensors: Mapping[str, ir.ExternalTensor]
    shared: ir.Value | None = None
    block: int | None = None

    @property
    def weight(self) -> ir.ExternalTensor:
        return self.tensors["weight"]

    def follows(self, other: Projection) -> bool:
        """Whether its tensors begin where the other's end, and are used alike."""
        return (
            self.tensors.keys() == other.tensors.keys()
            and (self.shared is None, self.block) == (other.shared is None, other.block)
            and all(
                mine.location == theirs.location and begin(mine) == begin(theirs) + (theirs.length or 0)
                for mine, theirs in zip(self.tensors.values(), other.tensors.values(), strict=True)
            )
        )


def begin(tensor: ir.ExternalTensor) -> int:
    """Where its bytes begin."""
    return tensor.offset or 0


def projection_of(model: ir.Model, node: ir.Node) -> Projection | None:
    """The call as one of a linear layer, if it is one."""
    function = model.functions.get(node.op_identifier())
    if function is None or len(function.outputs) != 1 or len(node.inputs) != len(function.inputs):
        return None
    product = _squeezed(function.outputs[0])
    read = None if product is None else _gemm(product) or _quantized(product)
    if read is None or set(read.inputs) != set(function.inputs) or read.x is not function.inputs[0]:
        return None
    given = dict(zip(function.inputs, node.inputs, strict=True))
    shared = given[read.shared] if read.shared is not None else None
    if read.shared is not None and read.shared.name not in function.metadata_props.get(SHARED, "").split():
        return None
    tensors = {}
    for role, inside in read.rows.items():
        value = given[inside]
        tensor = value.const_value if value is not None else None
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        tensors[role] = tensor
    x = given[read.x]
    return None if x is None else Projection(node, x, tensors, shared, read.block)


@dataclass(frozen=True)
class _Read:
    """What a body reads, by role."""

    x: ir.Value
    rows: Mapping[str, ir.Value]
    shared: ir.Value | None = None
    block: int | None = None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        return (self.x, *self.rows.values(), *(() if self.shared is None else (self.shared,)))


def _squeezed(value: ir.Value) -> ir.Node | None:
    """What makes a value before it gets its second axis."""
    node = value.producer()
    if node is None or node.op_type != "Unsqueeze" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    axes = ir.convenience.get_const_tensor(node.inputs[1])
    return node.inputs[0].producer() if axes is not None and axes.numpy().tolist() == [1] else None


def _gemm(gemm: ir.Node) -> _Read | None:
    if gemm.op_type != "Gemm" or "transB" not in gemm.attributes:
        return None
    expected = {"transB": 1.0, "transA": 0.0, "alpha": 1.0, "beta": 1.0}
    if any(a.is_ref() or float(a.value) != expected.get(name) for name, a in gemm.attributes.items()):
        return None
    x, *read = gemm.inputs
    if x is None or None in read:
        return None
    return _Read(x, {role: value for role, value in zip(("weight", "bias"), read, strict=False) if value is not None})


def _quantized(node: ir.Node) -> _Read | None:
    rows = {}
    for role, op in (("bias", "Add"), ("channel", "Mul")):
        if node.op_type == op:
            first, vector = node.inputs
            before = first.producer() if first is not None else None
            if before is None or vector is None:
                return None
            rows[role], node = vector, before
    transpose = _producer(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
    dequantize = _producer(transpose.inputs[0], "DequantizeLinear") if transpose is not None else None
    if transpose is None or dequantize is None or len(dequantize.inputs) != 2:
        return None
    x, (weight, scale) = node.inputs[0], dequantize.inputs
    if x is None or weight is None or scale is None or tuple(transpose.attributes["perm"].as_ints()) != (1, 0):
        return None
    block = dequantize.attributes.get_int("block_size", 0)
    if not block:
        return _Read(x, {"weight": weight, **rows}, scale, 0) if scale.shape is not None and not scale.shape else None
    if dequantize.attributes.get_int("axis", 1) != 1:
        return None
    return _Read(x, {"weight": weight, "scale": scale, **rows}, None, block)


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None
