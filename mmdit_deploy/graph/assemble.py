"""The whole graph: one node per call, functions by kind, weights by reference into one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from mmdit_deploy.contract import Contract, TensorSpec
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.trace import OPSET, one_operator_registry, trace
from mmdit_deploy.model import Call

IR_VERSION = 11  # the first with opset 23; functions carry value_info since 10


@dataclass(frozen=True)
class Span:
    """Where one parameter's bytes lie in the weights file."""

    shape: tuple[int, ...]
    offset: int
    nbytes: int


def trace_kinds(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, ir.Function]:
    """One traced function per kind, by name: the cost does not grow with the number of calls."""
    kinds = {call.kind.function: call.kind for call in calls}
    with one_operator_registry():
        return {name: trace(kind, dtype) for name, kind in kinds.items()}


def assemble(
    name: str,
    calls: Sequence[Call],
    functions: Mapping[str, ir.Function],
    contract: Contract,
    spans: Mapping[str, Span],
    dtype: torch.dtype,
    *,
    location: str,
) -> ir.Model:
    """Call the functions in order, with weights by reference.

    Args:
        name: the graph's name.
        spans: where each parameter lies, by its path in `MMDiT`.
        dtype: the compute type.
        location: the weights file's name, beside the model.

    Returns:
        A model that holds no weights; the small constant tables (frequencies) are inside.
    """
    compute = onnx_dtype(str(dtype).removeprefix("torch."))

    def onnx_type(tensor: TensorSpec) -> ir.TensorType:
        return ir.TensorType(compute if tensor.dtype == "compute" else onnx_dtype(tensor.dtype))

    values = {t.name: _value(t, onnx_type(t)) for t in contract.inputs}
    initializers: dict[str, ir.Value] = {}
    nodes = []
    for call in calls:
        arguments = [values[n] for n in call.inputs]
        for weight in functions[call.kind.function].inputs[len(arguments) :]:
            path = f"{call.path}.{weight.name}"
            if path not in initializers:
                initializers[path] = _initializer(path, spans, call, weight.name or "", compute, location)
            arguments.append(initializers[path])
        outputs = [
            _value(TensorSpec(n, t.axes, t.dtype), onnx_type(t))
            for n, t in zip(call.outputs, call.kind.outputs, strict=True)
        ]
        values.update({v.name or "": v for v in outputs})
        nodes.append(ir.Node(DOMAIN, call.kind.function, arguments, outputs=outputs, name=call.path))

    graph = ir.Graph(
        [values[t.name] for t in contract.inputs],
        [values[t.name] for t in contract.outputs],
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": OPSET, DOMAIN: 1},
        name=name,
    )
    from mmdit_deploy import __version__

    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="mmdit-deploy", producer_version=__version__)
    for function in functions.values():
        model.functions[function.identifier()] = function.clone()
    return model


def _initializer(
    path: str, spans: Mapping[str, Span], call: Call, weight: str, compute: ir.DataType, location: str
) -> ir.Value:
    if path in spans:
        span = spans[path]
        shape = ir.Shape(span.shape)
        tensor: ir.TensorProtocol = ir.ExternalTensor(
            location, span.offset, span.nbytes, compute, shape=shape, name=path
        )
    else:  # a buffer: the same small table in every model of this shape
        with torch.device("meta"):  # buffers are made on the CPU; the weights beside them are not wanted
            table = dict(call.kind.build().named_buffers())[weight]
        shape = ir.Shape(table.shape)
        tensor = ir.tensor(table.numpy(), name=path)
    return ir.Value(name=path, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _value(tensor: TensorSpec, type_: ir.TensorType) -> ir.Value:
    return ir.Value(name=tensor.name, shape=ir.Shape(tensor.axes), type=type_)


def onnx_dtype(torch_name: str) -> ir.DataType:
    """ONNX's type for a dtype by torch's name, e.g. ``bfloat16``."""
    return {"float32": ir.DataType.FLOAT}.get(torch_name) or ir.DataType[torch_name.upper()]
