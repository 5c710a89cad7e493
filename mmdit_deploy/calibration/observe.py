"""One evaluation of the eager model over several samples in lockstep: each call's weights are there once, for all.

    for each call:   load its weights ─► sample 0, sample 1, … ─► drop what no later call reads

Peak memory: one call's weights, and of each sample what is still to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.model import Call, calls
from mmdit_deploy.model.partition import call_bytes
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.spec import PRECISIONS, ModelSpec

Progress = Callable[[str, int, int], None]
# Kept weights may take this share of the memory that is left: the rest is for the samples, and for others.
_KEPT_SHARE = 0.5


class Observer:
    """The eager model, evaluated call by call into one set of statistics.

    Args:
        dtype: the compute type that the graph will have, which decides what its values are called.
        keep: whether weights stay in memory between evaluations; None keeps them where fp32 weights take at most half
            of the memory that is left. What is computed is the same to the bit.
        programs: of the model's kinds, where they are traced already.
        progress: called with the call's name, its index and the number of calls.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        dtype: torch.dtype,
        *,
        keep: bool | None = None,
        programs: Mapping[str, Program] | None = None,
        progress: Progress | None = None,
    ):
        self.statistics = Statistics()
        self._calls = calls(spec)
        self._last = last_uses(self._calls)
        self._eager = EagerCalls(spec, source)
        self._programs = programs_of(self._calls, dtype) if programs is None else programs
        self._keep = fits(spec) if keep is None else keep
        self._kept: dict[str, Values] = {}
        self._progress = progress

    def evaluate(self, samples: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Compute the model.

        Args:
            samples: the model's inputs by name; each may have sizes of its own.

        Returns:
            The velocity of each, fp32 [batch, img_tokens, C_out].

        Raises:
            CheckpointError: the model computes NaN or Inf; it names the call and the value.
        """
        states: list[Values] = [dict(sample) for sample in samples]
        for index, call in enumerate(self._calls):
            if self._progress is not None:
                self._progress(call.path, index, len(self._calls))
            program, weights = self._programs[call.kind.function], self._weights(call)
            names = [tensor.name for tensor in call.kind.inputs]
            for state in states:
                activations = dict(zip(names, [state[name] for name in call.inputs], strict=True))
                made = self.statistics.run(call, program, activations, weights)
                state.update(zip(call.outputs, made, strict=True))
                for name in self._last[index]:
                    del state[name]
            del weights  # the next call's take their place
        return [state["sample"] for state in states]

    def _weights(self, call: Call) -> Values:
        if call.path in self._kept:
            return self._kept[call.path]
        weights = self._eager.weights(call)
        if self._keep:
            self._kept[call.path] = weights
        return weights


def fits(spec: ModelSpec) -> bool:
    """Whether the model's weights in fp32 take at most half of the memory that is left."""
    return sum(call_bytes(spec, PRECISIONS["fp32"]).values()) <= _KEPT_SHARE * available_memory()


def last_uses(calls: Sequence[Call]) -> list[list[str]]:
    """By call, the values that no later call reads; what the last call makes is kept."""
    last: dict[str, int] = {}
    for index, call in enumerate(calls):
        for name in (*call.inputs, *call.outputs):
            last[name] = index
    for name in calls[-1].outputs:
        del last[name]
    return [[name for name, at in last.items() if at == index] for index in range(len(calls))]
