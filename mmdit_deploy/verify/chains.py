"""A bundle's graph, stepped through call by call with one call's weights in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from mmdit_deploy.contract import TensorSpec
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.model import Call
from mmdit_deploy.runtime import open_session, run_session


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
