"""The precision plan in the graph: calls of functions become calls of their variants, with scales by reference.

    blocks.3: linear layers and attention in FP8, img_out in fp32
        [blocks.3] MMDiTJointBlock(img, …, weights)
    ⇒   [blocks.3] MMDiTJointBlock_fp8_fp32(img, …, weights in FP8, blocks.3.img.qkv.proj.weight_scale, …)

Calls are looked at in order: what one makes in fp32 the next one is given in fp32. The graph stays one of calls alone;
what must be cast is cast inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch

from mmdit_deploy.checkpoint import Layout
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.assemble import onnx_dtype
from mmdit_deploy.graph.fuse.clean import unused
from mmdit_deploy.graph.named_functions import define
from mmdit_deploy.graph.precision.fp8_attention import SCALES
from mmdit_deploy.graph.precision.variants import Structure, Variant, Variants
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.precision import PrecisionPlan, Scheme, Stored


def apply_plan(model: ir.Model, plan: PrecisionPlan, layout: Layout, *, location: str) -> int:
    """Give a fused standard graph the precision that was planned, in place.

    Args:
        model: assembled: each node of the main graph is a call, and named by its path.
        layout: of the weights file, with quantized weights under their canonical keys and the other tensors under
            ``<linear path>.<name>`` and ``<call>.attention.<i>.<name>``.
        location: the weights file's name, beside the model.

    Returns:
        How many calls are now calls of a variant.

    Raises:
        GraphError: the plan names what the model lacks, or what cannot be in that precision.
        ValueError: the layout is of another plan.
    """
    compute = getattr(torch, plan.precision.dtype)
    variants = Variants({f.name for f in model.functions.values()}, compute)
    file = _WeightsFile(layout, location, onnx_dtype(plan.precision.dtype))
    by_call = _schemes_by_call(plan)
    edge = set(model.graph.outputs)
    planned = by_call.keys() | plan.attentions.keys() | plan.wide.keys()
    count = 0
    for node in model.graph:
        base = model.functions.get(node.op_identifier())
        if base is None:
            continue
        path = node.name or ""
        planned = planned - {path}
        structure = _structure(node, base, by_call.get(path, {}), plan, edge)
        if structure is None:
            continue
        variant = variants.of(base, structure)
        model.functions[variant.function.identifier()] = variant.function
        _call(model.graph, node, variant, structure, file)
        count += 1
    if planned:
        raise GraphError(
            "a precision plan names calls of the model, and layers of these",
            received=f"{', '.join(sorted(planned)[:5])}, which it does not have",
            fix="make the plan for this model",
        )
    if count:
        unused.nodes.apply(model)
        define(model)
    return count


def _schemes_by_call(plan: PrecisionPlan) -> dict[str, dict[str, Scheme]]:
    """Schemes by path in the function, by call; what no call has stays under the layer's own path."""
    found: dict[str, dict[str, Scheme]] = {}
    for path, linear in plan.linears.items():
        call = call_of(path)
        found.setdefault(call, {})[path.removeprefix(f"{call}.")] = linear.scheme
    return found


def _structure(
    node: ir.Node, base: ir.Function, schemes: Mapping[str, Scheme], plan: PrecisionPlan, edge: set[ir.Value]
) -> Structure | None:
    """What the call is to be; None where it stays."""
    path = node.name or ""
    given = []
    for value, inside in zip(node.inputs, base.inputs, strict=True):
        assert value is not None
        quantized = (inside.name or "").removesuffix(".weight") in schemes
        given.append(None if quantized or value.dtype == inside.dtype else value.dtype)
    structure = Structure(
        base.name,
        tuple((linear, schemes[linear]) for linear in _in_order(base, schemes)),
        len(plan.attentions.get(path, ())),
        frozenset(plan.wide.get(path, ())),
        tuple(given),
        tuple(value in edge for value in node.outputs),
    )
    changed = structure.schemes or structure.attentions or structure.wide or any(given)
    return structure if changed else None


def _in_order(base: ir.Function, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """Its quantized layers, in the order of their weights; those that it lacks at the end."""
    linears = [(value.name or "").removesuffix(".weight") for value in base.inputs]
    yield from (linear for linear in linears if linear in schemes)
    yield from (linear for linear in schemes if linear not in linears)


class _WeightsFile:
    """Initializers that lie in the weights file."""

    def __init__(self, layout: Layout, location: str, compute: ir.DataType):
        self._layout, self._location, self._compute = layout, location, compute

    def weight(self, value: ir.Value, stored: Stored) -> None:
        """Let a weight be what is stored: its bytes are where they were said to be, in another type."""
        before = value.const_value
        dtype = ir.DataType[stored.onnx]
        nbytes = math.prod(stored.shape) * stored.dtype.itemsize
        if not isinstance(before, ir.ExternalTensor) or before.length != nbytes:
            raise ValueError(f"{value.name} takes {nbytes} bytes as {stored.onnx}: the layout is of another plan")
        value.const_value = ir.ExternalTensor(
            self._location, before.offset, nbytes, dtype, shape=ir.Shape(stored.logical), name=value.name or ""
        )
        value.type = ir.TensorType(dtype)

    def tensor(self, key: str, stored: Stored | None = None) -> ir.Value:
        """A tensor under its key; without more said, a number in the compute type."""
        info = self._layout.tensors.get(key)
        dtype = self._compute if stored is None else ir.DataType[stored.onnx]
        dims = () if stored is None else stored.logical
        if info is None or info.shape != dims or info.nbytes != math.prod(dims) * dtype.itemsize:
            raise ValueError(f"{key} is a tensor {dims} of {dtype.name}: the layout is of another plan")
        shape = ir.Shape(dims)
        tensor = ir.ExternalTensor(self._location, info.offset, info.nbytes, dtype, shape=shape, name=key)
        return ir.Value(name=key, shape=shape, type=ir.TensorType(dtype), const_value=tensor)


def _call(graph: ir.Graph, node: ir.Node, variant: Variant, structure: Structure, file: _WeightsFile) -> None:
    """Let a call be one of a variant: more inputs, and outputs of its types."""
    path, function = node.name or "", variant.function
    more = []
    for linear, (weight, *others) in variant.stored.items():
        index = next(i for i, v in enumerate(function.inputs) if v.name == f"{linear}.weight")
        value = node.inputs[index]
        assert value is not None
        file.weight(value, weight)
        more += [file.tensor(f"{path}.{linear}.{tensor.name}", tensor) for tensor in others]
    for i in range(structure.attentions):
        more += [file.tensor(f"{path}.attention.{i}.{name}") for name in SCALES]
    first = len(node.inputs)
    node.resize_inputs(first + len(more))
    for i, value in enumerate(more):
        graph.register_initializer(value)
        node.replace_input_with(first + i, value)
    node.op_type = function.name
    for value, inside in zip(node.outputs, function.outputs, strict=True):
        value.type = inside.type
