"""The reference: the eager model in fp32, stepped through call by call with one call's weights in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdit_deploy.checkpoint.keys import Parameter, parameters
from mmdit_deploy.checkpoint.weights import WeightSource, read_parameter
from mmdit_deploy.model import Call
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.spec import ModelSpec

Values = dict[str, Tensor]


class EagerCalls:
    """The eager model in fp32, call by call, with the source's weights."""

    def __init__(self, spec: ModelSpec, source: WeightSource):
        self._source = source
        self._modules: dict[str, nn.Module] = {}
        self._parameters: dict[str, list[Parameter]] = {}
        for parameter in parameters(spec):
            self._parameters.setdefault(call_of(parameter.path), []).append(parameter)

    def load(self, call: Call) -> EagerCall:
        """The call with its weights in memory."""
        function = call.kind.function
        if function not in self._modules:
            with torch.device("meta"):  # buffers are made on the CPU; parameters come from the source
                self._modules[function] = call.kind.build().eval()
        return EagerCall(self._modules[function], [t.name for t in call.kind.inputs], self.weights(call))

    def weights(self, call: Call) -> Values:
        """The call's parameters in fp32, by their names in its module."""
        return {
            p.path.removeprefix(f"{call.path}."): read_parameter(self._source, p, torch.float32)
            for p in self._parameters.get(call.path, ())
        }


class EagerCall:
    """One call of the eager model, with its weights: fp32, by their names in the module."""

    def __init__(self, module: nn.Module, names: Sequence[str], weights: Values):
        self.module, self.names, self.weights = module, names, weights

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """fp32 in, fp32 out; a mask stays bool."""
        with torch.inference_mode():
            wide = {name: t.float() if t.is_floating_point() else t for name, t in zip(self.names, inputs, strict=True)}
            out = torch.func.functional_call(self.module, self.weights, kwargs=wide)
        return out if isinstance(out, tuple) else (out,)
