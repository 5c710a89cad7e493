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
        self.graph, self._folder, self._target, self._dtype = graph, folder, target, dtype

    def load(self, call: Call) -> EngineCall:
        """The call with its weights in memory."""
        part = extract_call(self.graph, call.path)
        session = open_session(part.SerializeToString(), self._target, weights_folder=self._folder)
        return EngineCall(session, call, self._dtype)


class EngineCall:
    """One call of a graph, loaded.

    Its session says which type each activation has: the compute type, the contract's fp32, or fp32 in its place where
    the precision plan keeps a value wide, or where a graph emulates bf16.
    """

    def __init__(self, session: object, call: Call, dtype: torch.dtype):
        self._session, self._call, self._dtype = session, call, dtype
        self._inputs = [(i.name, TORCH_TYPES[i.type]) for i in session.get_inputs()]  # type: ignore[attr-defined]
        self._outputs = [(o.name, TORCH_TYPES[o.type]) for o in session.get_outputs()]  # type: ignore[attr-defined]

    def rounded(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Exact activations as the engine can have them; what it keeps in fp32 stays as it is.

        fp32 may stand for bf16 in a graph that emulates it: there, values are rounded to it all the same. Nothing
        overflows by that.
        """
        made = []
        for (_, dtype), tensor, spec in zip(self._inputs, inputs, self._call.kind.inputs, strict=True):
            emulated = spec.dtype == "compute" and self._dtype == torch.bfloat16
            made.append(tensor.to(self._dtype if emulated else dtype))
        return made

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Activations in, activations out; what comes out is as wide as the graph hands it on."""
        fed = {name: t.to(dtype) for (name, dtype), t in zip(self._inputs, inputs, strict=True)}
        sizes = axis_sizes(self._call.kind.inputs, inputs)
        outputs = [
            (name, dtype, t.shape(sizes))
            for (name, dtype), t in zip(self._outputs, self._call.kind.outputs, strict=True)
        ]
        results = run_session(self._session, fed, outputs)
        return tuple(results[name] for name, _ in self._outputs)


TORCH_TYPES = {
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
