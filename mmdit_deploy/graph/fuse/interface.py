"""What a caller sees of a graph stays while passes work on it: inputs, outputs, and what inputs are by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir

INITIALIZERS_ARE_INPUTS = 4  # before this IR version all were listed as inputs, and none was a default


@contextlib.contextmanager
def kept_interface(model: ir.Model) -> Iterator[None]:
    """Keep the shapes of inputs and outputs as declared, and hide the defaults of inputs from passes.

    Inference calls an output's dims by what they are made of, and nameless dims of inputs by names of its own: good for
    rules. A default is no constant, because a caller may give something else.
    """
    graph = model.graph
    inputs, outputs = ([v.shape for v in values] for values in (graph.inputs, graph.outputs))
    defaults = {v: v.const_value for v in graph.inputs if v.is_initializer() and _may_have_defaults(model)}
    for value in defaults:
        del graph.initializers[value.name or ""]
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in defaults.items():
            value.const_value = tensor
            graph.register_initializer(value)
        for values, shapes in ((graph.inputs, inputs), (graph.outputs, outputs)):
            for value, shape in zip(values, shapes, strict=False):
                value.shape = shape


def _may_have_defaults(model: ir.Model) -> bool:
    return model.ir_version >= INITIALIZERS_ARE_INPUTS
