"""The two sides of a comparison, both stepping through the model's calls with one call's weights in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from mmdit_deploy.checkpoint.keys import Parameter, parameters
from mmdit_deploy.checkpoint.weights import WeightSource, read_parameter
from mmdit_deploy.contract import TensorSpec
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.model import Call
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import ModelSpec

Values = dict[str, Tensor]


class EagerCalls:
    """The reference: the eager model in fp32, call by call, with the source's weights."""

    def __init__(self, spec: ModelSpec, source: WeightSource):
        self._source = source
        self._modules: dict[str, nn.Module] = {}
        self._parameters: dict[str, list[Parameter]] = {}
        for parameter in parameters(spec):
            self._parameters.setdefault(call_of(parameter.path), []).append(parameter)

    def load(self, call: Call) -> _EagerCall:
        """The call with its weights in memory."""
        function = call.kind.function
        if function not in self._modules:
            with torch.device("meta"):  # buffers are made on the CPU; parameters come from the source
                self._modules[function] = call.kind.build().eval()
        weights = {
            p.path.removeprefix(f"{call.path}."): read_parameter(self._source, p, torch.float32)
            for p in self._parameters.get(call.path, ())
        }
        return _EagerCall(self._modules[function], [t.name for t in call.kind.inputs], weights)


class _EagerCall:
    def __init__(self, module: nn.Module, names: Sequence[str], weights: Values):
        self._module, self._names, self._weights = module, names, weights

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """fp32 in, fp32 out; a mask stays bool."""
        with torch.inference_mode():
            wide = {
                name: t.float() if t.is_floating_point() else t for name, t in zip(self._names, inputs, strict=True)
            }
            out = torch.func.functional_call(self._module, self._weights, kwargs=wide)
        return out if isinstance(out, tuple) else (out,)


class EngineCalls:
    """A graph of a bundle, cut at its calls, on ONNX Runtime, with the weights where the graph says they are.

    Args:
        graph: weights by reference.
        folder: the weights file's.
        target: ``ort-cpu`` or ``ort-cuda``.
        dtype: the compute type.
    """

    def __init__(self, graph: onnx.ModelProto, folder: Path, target: str, dtype: torch.dtype):
        self._graph, self._folder, self._target, self._dtype = graph, folder, target, dtype

    def load(self, call: Call) -> _EngineCall:
        part = extract_call(self._graph, call.path)
        session = open_session(part.SerializeToString(), self._target, weights_folder=self._folder)
        return _EngineCall(session, call, self._dtype)


class _EngineCall:
    def __init__(self, session: object, call: Call, dtype: torch.dtype):
        self._session, self._call, self._dtype = session, call, dtype
        # An emulated graph carries activations in fp32 between calls, whatever the compute type.
        self._inputs = [(i.name, _TORCH[i.type]) for i in session.get_inputs()]  # type: ignore[attr-defined]
        self._outputs = [(o.name, _TORCH[o.type]) for o in session.get_outputs()]  # type: ignore[attr-defined]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Inputs in the compute type (or the contract's fp32), outputs in the compute type."""
        fed = {name: t.to(dtype) for (name, dtype), t in zip(self._inputs, inputs, strict=True)}
        sizes = axis_sizes(self._call.kind.inputs, inputs)
        outputs = [
            (name, dtype, t.shape(sizes))
            for (name, dtype), t in zip(self._outputs, self._call.kind.outputs, strict=True)
        ]
        results = run_session(self._session, fed, outputs)
        return tuple(results[name].to(self._dtype) for name, _ in self._outputs)


_TORCH = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(bool)": torch.bool,
}


def axis_sizes(specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> Mapping[str, int]:
    """The size of each symbolic axis, read off tensors."""
    return {
        axis: size
        for spec, tensor in zip(specs, tensors, strict=True)
        for axis, size in zip(spec.axes, tensor.shape, strict=True)
        if isinstance(axis, str)
    }
