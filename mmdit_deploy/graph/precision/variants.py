"""Variants of functions: calls of equal structure share one.

    [blocks.0] MMDiTJointBlock(…)           [blocks.0] MMDiTJointBlock_fp8(…, scales)
    [blocks.1] MMDiTJointBlock(…)      ⇒    [blocks.1] MMDiTJointBlock_fp8(…, scales)
    [blocks.2] MMDiTJointBlock(…)           [blocks.2] MMDiTJointBlock_fp8_fp32(…, scales)

What differs in value, such as a scale, is an input. What differs in structure is another variant: which layers are
quantized and how, which attentions are in FP8, which values are in fp32, and what the call is given in fp32.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import onnx_ir as ir
import torch

from mmdit_deploy.graph.precision.fp8_attention import fp8_attention
from mmdit_deploy.graph.precision.islands import widen
from mmdit_deploy.graph.precision.quantized_linear import quantize_linear
from mmdit_deploy.precision import Scheme, Stored


@dataclass(frozen=True)
class Structure:
    """What a variant is made by.

    Args:
        function: its name before.
        schemes: of its quantized layers, by path in the function, in the order of their weights.
        attentions: how many of its attentions are in FP8, from the first on.
        wide: values that stay in fp32.
        given: of each input the type that the call has it in, where that is another than the function's.
        edge: of each output whether it is one of the graph's, which stay in the type that they had.
    """

    function: str
    schemes: tuple[tuple[str, Scheme], ...]
    attentions: int
    wide: frozenset[str]
    given: tuple[ir.DataType | None, ...]
    edge: tuple[bool, ...]


@dataclass(frozen=True)
class Variant:
    """A function of one structure.

    Args:
        stored: what each of its quantized layers is stored as, by path in the function; the weight is the first.
    """

    function: ir.Function
    stored: dict[str, tuple[Stored, ...]]


class Variants:
    """The variants of a model's functions, made when they are first asked for.

    Args:
        taken: names that functions have already.
        compute: the compute type.
    """

    def __init__(self, taken: set[str], compute: torch.dtype):
        self._taken, self._compute = taken, compute
        self._made: dict[Structure, Variant] = {}

    def of(self, base: ir.Function, structure: Structure) -> Variant:
        """The variant of that structure; the base is not changed."""
        if structure not in self._made:
            function = base.clone()
            function.name = self._name(base, structure)
            self._taken.add(function.name)
            tensors = {
                linear: quantize_linear(function, linear, scheme, self._compute) for linear, scheme in structure.schemes
            }
            fp8_attention(function, structure.attentions)
            if structure.wide:
                widen(function, structure.wide)
            _cast_inputs(function, base, structure)
            _cast_outputs(function, base, structure)
            self._made[structure] = Variant(function, tensors)
        return self._made[structure]

    def _name(self, base: ir.Function, structure: Structure) -> str:
        words = [scheme.name.replace("-", "_") for _, scheme in structure.schemes]
        if structure.attentions:
            words.append("fp8")
        if structure.wide:
            words.append("fp32")
        elif any(structure.given):
            words.append("fp32in")
        stem = "_".join([base.name, *dict.fromkeys(words)])
        numbered = (f"{stem}_{i}" for i in itertools.count(2))
        return next(name for name in itertools.chain([stem], numbered) if name not in self._taken)


def _cast_inputs(function: ir.Function, base: ir.Function, structure: Structure) -> None:
    """Let inputs be what the callers have; where the body wants another type, it casts."""
    quantized = {f"{linear}.weight" for linear, _ in structure.schemes}
    for value, before, given in zip(function.inputs, base.inputs, structure.given, strict=False):
        theirs, wanted = given or before.dtype, value.dtype
        if theirs is None or wanted is None or theirs == wanted or value.name in quantized:
            continue
        uses = list(value.uses())
        value.type = ir.TensorType(theirs)
        inside = _cast(value, wanted)
        for node, index in uses:
            node.replace_input_with(index, inside.outputs[0])
        function.insert_before(function[0], inside)


def _cast_outputs(function: ir.Function, base: ir.Function, structure: Structure) -> None:
    for i, (value, before) in enumerate(zip(list(function.outputs), base.outputs, strict=True)):
        if not structure.edge[i] or before.dtype in (None, value.dtype):
            continue
        name, value.name = value.name, f"{value.name}.inside"
        cast = _cast(value, before.dtype)
        cast.outputs[0].name = name
        function.append(cast)
        function.outputs[i] = cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{value.name}.{dtype.short_name()}")
    made = node.outputs[0]
    made.name, made.shape, made.type = node.name, value.shape, ir.TensorType(dtype)
    return node
