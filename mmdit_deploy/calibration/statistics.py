"""What calibration keeps of the tensors that it sees: ranges, and histograms where scales are chosen from them.

One pass over each tensor while it is there, and nothing of its size is kept: the memory of a tensor's statistics does
not depend on how many tokens, samples or steps went by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mmdit_deploy.eager.program import Program
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.model import Call
from mmdit_deploy.precision import AttentionScales

# A magnitude's bin is its fp32 exponent and the first bits of its mantissa: 32 bins per octave. Integers alone decide,
# so that counts are the same to the bit on any machine.
_SHIFT = 23 - 5
BINS = 0x7F800000 >> _SHIFT  # of all finite magnitudes

_CONSTANT = torch.ops.aten.scalar_tensor.default
_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Range:
    """How large one tensor's values were.

    Attributes:
        amax: the largest magnitude.
    """

    def __init__(self) -> None:
        self.amax, self._squares, self._count = 0.0, 0.0, 0

    @property
    def rms(self) -> float:
        """The root of the mean square of everything that was seen."""
        return math.sqrt(self._squares / self._count) if self._count else 0.0

    def add(self, values: Tensor, largest: float) -> None:
        """Take values of any shape in, whose largest magnitude is known."""
        self.amax = max(self.amax, largest)
        self._squares += float(torch.linalg.vector_norm(values)) ** 2
        self._count += values.numel()


class LinearStatistics:
    """The inputs of one linear layer.

    Attributes:
        channels: the largest magnitude of each input channel, fp32 [in].
        histogram: how many magnitudes were in each bin, int64 [BINS]; see `bin_edges`.
    """

    def __init__(self, channels: int):
        self.channels = torch.zeros(channels)
        self.histogram = torch.zeros(BINS, dtype=torch.int64)

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return float(self.channels.max())

    def add(self, values: Tensor) -> None:
        """Take inputs in: fp32 [..., in]."""
        sizes = values.abs().flatten(0, -2)
        torch.maximum(self.channels, sizes.amax(0), out=self.channels)
        self.histogram += torch.bincount(sizes.view(torch.int32).flatten() >> _SHIFT, minlength=BINS)


def bin_edges() -> Tensor:
    """Where each bin begins, and the last one ends: fp64 [BINS + 1]."""
    edges = (torch.arange(BINS, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    return torch.cat([edges, edges.new_tensor([2.0**128])])


class Statistics:
    """What was seen of a model, call by call.

    Attributes:
        values: by call and by the name of the value in the standard graph's function: every float that the call reads
            or makes, weights and constants apart. Activations and outputs have the names of the kind's.
        linears: the inputs of linear layers, by the layer's path in `MMDiT`.
        attentions: by call: the largest magnitudes of its attentions' operands, in the order of the block.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Range]] = {}
        self.linears: dict[str, LinearStatistics] = {}
        self.attentions: dict[str, tuple[AttentionScales, ...]] = {}

    def run(
        self, call: Call, program: Program, activations: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Compute a call, and take in what it reads and makes.

        Args:
            program: of the call's kind.
            activations: by name.
            weights: parameters in fp32, by name in the module.

        Returns:
            The outputs of the kind, fp32.

        Raises:
            CheckpointError: NaN or Inf; it names the call and the value.
        """
        ranges = self.values.setdefault(call.path, {})
        operands: list[AttentionScales] = []

        def tap(node: fx.Node, value: Tensor) -> Tensor:
            if node.target is not _CONSTANT:
                _take(call, ranges, program.outputs.get(node.name, node.name), value)
            return value

        def watch(node: fx.Node, arguments: Sequence[Any]) -> None:
            if node.target is _LINEAR:
                self._linear(call, program, node, arguments[0])
            elif node.target is _ATTENTION:
                operands.append(AttentionScales(*(amax(t) for t in arguments[:3])))

        for name, value in activations.items():
            _take(call, ranges, name, value)
        made = program.run(activations, weights, tap=tap, replace=watch)
        if operands:
            before = self.attentions.get(call.path, operands)
            self.attentions[call.path] = tuple(_larger(a, b) for a, b in zip(before, operands, strict=True))
        return made

    def _linear(self, call: Call, program: Program, node: fx.Node, values: Tensor) -> None:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        path = f"{call.path}.{program.names[weight.name].removesuffix('.weight')}"
        if path not in self.linears:
            self.linears[path] = LinearStatistics(values.shape[-1])
        self.linears[path].add(values)


def amax(values: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    return max(-float(values.amin()), float(values.amax()))  # two passes, and half the time of `aminmax`


def _take(call: Call, ranges: dict[str, Range], name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        return
    largest = amax(value)
    if not math.isfinite(largest):
        raise _broken(call, name, value)
    ranges.setdefault(name, Range()).add(value, largest)


def _broken(call: Call, name: str, value: Tensor) -> CheckpointError:
    nan, inf = int(value.isnan().sum()), int(value.isinf().sum())
    return CheckpointError(
        "the eager model in fp32 computes finite numbers: nothing can be calibrated, or compared, on others",
        received=f"{nan} NaN and {inf} Inf of {value.numel()} values in {call.path}: {name}",
        fix="check the checkpoint, and the inputs given for calibration",
    )


def _larger(a: AttentionScales, b: AttentionScales) -> AttentionScales:
    return AttentionScales(max(a.q_amax, b.q_amax), max(a.k_amax, b.k_amax), max(a.v_amax, b.v_amax))
