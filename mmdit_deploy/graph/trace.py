"""Trace one kind of call, on fake tensors, to an ONNX function of activations and weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.axis_names import name_axes
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.model import Kind

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
# Examples of 0 or 1 would be baked in; unlike sizes keep the axes apart.
EXAMPLE_SIZES = {"batch": 3, "img_tokens": 37, "txt_tokens": 11}


class _Pure(nn.Module):
    """``module`` as a function of (activations, weights)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = (module,)  # not a submodule: its weights must not become this one's

    def forward(self, activations: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = torch.func.functional_call(self._module[0], weights, kwargs=activations)
        return out


def trace(kind: Kind, dtype: torch.dtype) -> ir.Function:
    """The kind's ONNX function. Its inputs are the activations, then the parameters and buffers of the module.

    No weight memory is used, and the cost does not depend on the model's depth.

    Args:
        dtype: the compute type of weights and activations.
    """
    shared, key = _shared.get(), (kind.function, dtype)
    if shared is not None and key in shared.functions:
        return shared.functions[key].clone()
    program, weights = export_kind(kind, dtype)
    function = _as_function(kind, program.model, weights)  # it takes the model apart
    if shared is not None:
        shared.functions[key] = function.clone()
    return function


@dataclass
class _Shared:
    """What was traced, by function and type."""

    programs: dict[tuple[str, torch.dtype], tuple[torch.onnx.ONNXProgram, list[str]]] = field(default_factory=dict)
    functions: dict[tuple[str, torch.dtype], ir.Function] = field(default_factory=dict)


_shared: ContextVar[_Shared | None] = ContextVar("traces", default=None)


@contextlib.contextmanager
def shared_traces() -> Iterator[None]:
    """Trace each kind of one model once within the block: for its graph, its calibration and its verification."""
    token = _shared.set(_Shared())
    try:
        yield
    finally:
        _shared.reset(token)


def export_kind(kind: Kind, dtype: torch.dtype) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """The kind as the exporter leaves it: operators of PyTorch, and ONNX nodes whose values have the same names.

    Returns:
        The program, whose inputs are the activations and then the weights; and the weights' names. Its ONNX model is
        `trace`'s to take.
    """
    shared, key = _shared.get(), (kind.function, dtype)
    if shared is None:
        return _export(kind, dtype)
    if key not in shared.programs:
        shared.programs[key] = _export(kind, dtype)
    return shared.programs[key]


def _export(kind: Kind, dtype: torch.dtype) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    with FakeTensorMode(), _default_dtype(dtype):
        module = kind.build()
        weights = {
            **{name: p.detach() for name, p in module.named_parameters()},
            **{name: b.detach() for name, b in module.named_buffers()},
        }
        activations = {
            t.name: torch.empty(
                t.shape(EXAMPLE_SIZES), dtype=getattr(torch, t.dtype) if t.dtype != "compute" else dtype
            )
            for t in kind.inputs
        }
        # A sum of axes has no Dim of its own: where its parts are inputs too, it must equal them.
        axes = {
            a: torch.export.Dim.DYNAMIC if " + " in a else torch.export.Dim(a)
            for t in kind.inputs
            for a in t.axes
            if isinstance(a, str)
        }
        dynamic = {t.name: {i: axes[a] for i, a in enumerate(t.axes) if isinstance(a, str)} for t in kind.inputs}
        with _quiet():
            exported = torch.export.export(
                _Pure(module),
                (activations, weights),
                dynamic_shapes=(dynamic, dict.fromkeys(weights)),
                strict=False,
            )
            program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
    if program is None:
        raise GraphError(f"{kind.function} could not be traced", fix="report this as a bug")
    return program, list(weights)


def _as_function(kind: Kind, model: ir.Model, weight_names: list[str]) -> ir.Function:
    graph = model.graph
    names = [t.name for t in kind.inputs] + weight_names
    if len(graph.inputs) != len(names):
        raise GraphError(
            f"{kind.function} has the inputs {names}",
            received=str([v.name for v in graph.inputs]),
            fix="report this as a bug",
        )
    name_axes(graph, kind.inputs)
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    for value, tensor in zip(graph.outputs, kind.outputs, strict=True):
        value.name = tensor.name
    _initializers_to_constants(graph)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)  # stack traces of the exporter: most of the file's size
    return ir.Function(DOMAIN, kind.function, graph=graph, attributes=[])


def _initializers_to_constants(graph: ir.Graph) -> None:
    """A function has no initializers: the few small ones that the tracer makes become Constant nodes.

    Equal ones become one node. The exporter merges only small ones itself, and norms of one input are seen to be the
    same only where their weights (of ones) are.
    """
    made: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            raise GraphError(f"the tracer's constant {name} has a value", received="none", fix="report this as a bug")
        content = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if content not in made:
            constant = ir.node("Constant", [], attributes={"value": tensor})
            out = constant.outputs[0]
            out.name, out.type, out.shape = name, value.type, value.shape
            graph.insert_before(graph[0], constant)
            made[content] = out
        ir.convenience.replace_all_uses_with(value, made[content])
        del graph.initializers[name]


@contextlib.contextmanager
def one_operator_registry() -> Iterator[None]:
    """Let the exporter build its table of operators once within the block, not at every call.

    It parses the source of all 500 functions of torchlib each time (0.3 s of the 0.45 s that a small kind takes). The
    table is only read. This reaches into a private module: where that has changed, tracing just takes longer.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with mock.patch.object(ONNXRegistry, "from_torchlib", once):
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # Set before construction: `.half()` under fake tensors fails with a swap_tensors error.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about its own internals; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
