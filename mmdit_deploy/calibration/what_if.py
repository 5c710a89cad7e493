"""What if only this were quantized? The eager model with parts of a plan carried out, next to the model as it is.

All parts are followed at once, so that each call's weights are read once. A part's chain leaves the exact one at the
first call that it quantizes, and shares every value before it:

    exact     call 0 ─► call 1 ─► call 2 ─► call 3 ─► sample
    part A                └─────► call 2'─► call 3'─► sample'
    part B                          └─────► call 3'─► sample'

Peak memory: one call's weights, and of each sample and part what is still to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mmdit_deploy.calibration.observe import Progress, last_uses
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.model import Call, calls
from mmdit_deploy.precision import PrecisionPlan, Scheme
from mmdit_deploy.precision.quantize import (
    Tensors,
    attention_scales,
    quantize_weight,
    simulate,
    simulate_attention,
)
from mmdit_deploy.spec import ModelSpec

_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Part:
    """A part of a plan: some of its linear layers by path, and some of its FP8 attentions by call."""

    linears: frozenset[str] = frozenset()
    attentions: frozenset[str] = frozenset()

    def __or__(self, other: Part) -> Part:
        return Part(self.linears | other.linears, self.attentions | other.attentions)


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from the exact one: ‖a − b‖ / ‖b‖, and the cosine of their angle."""

    rel_l2: float
    cosine: float

    @staticmethod
    def of(received: Tensor, exact: Tensor) -> Distance:
        a, b = received.double().flatten(), exact.double().flatten()
        norms = float(a.norm() * b.norm())
        return Distance(_ratio(float((a - b).norm()), float(b.norm())), float(a @ b) / norms if norms else 1.0)

    @staticmethod
    def worst(distances: Sequence[Distance]) -> Distance:
        """The largest error and the least cosine, of one distance or more; NaN where there is one."""
        return Distance(_largest([d.rel_l2 for d in distances]), -_largest([-d.cosine for d in distances]))


@dataclass(frozen=True)
class Effect:
    """What carrying a part out does.

    Args:
        output: to the model's final output, by sample.
        local: to the outputs of the calls that are quantized, on equal inputs, by sample; None where the part
            quantizes a call whose inputs another one of its calls has changed.
    """

    output: tuple[Distance, ...]
    local: tuple[Distance, ...] | None


def effects(
    spec: ModelSpec,
    source: WeightSource,
    plan: PrecisionPlan,
    parts: Sequence[Part],
    samples: Sequence[Mapping[str, Tensor]],
    *,
    programs: Mapping[str, Program] | None = None,
    progress: Progress | None = None,
) -> list[Effect]:
    """The effect of each part of a plan, everything else in fp32.

    Args:
        samples: the model's inputs by name; each may have sizes and a timestep of its own.
        programs: of the model's kinds, where they are traced already.
        progress: called with the call's name, its index and the number of calls.
    """
    chain = calls(spec)
    traced = programs_of(chain, getattr(torch, plan.precision.dtype)) if programs is None else programs
    eager, last = EagerCalls(spec, source), last_uses(chain)
    runs = [_Run(sample, parts) for sample in samples]
    for index, call in enumerate(chain):
        if progress is not None:
            progress(call.path, index, len(chain))
        quantized = _Quantized(spec, call, traced[call.kind.function], eager.weights(call), plan, parts)
        for run in runs:
            run.step(quantized)
            run.forget(last[index])
    return [_effect(runs, index) for index in range(len(parts))]


class _Quantized:
    """One call, and what the plan's parts make of it."""

    def __init__(
        self,
        spec: ModelSpec,
        call: Call,
        program: Program,
        weights: Values,
        plan: PrecisionPlan,
        parts: Sequence[Part],
    ):
        self.call, self._program, self._weights = call, program, weights
        compute = getattr(torch, plan.precision.dtype)
        self._layers: dict[str, tuple[Scheme, Tensors]] = {}
        for name, weight in weights.items():
            path = f"{call.path}.{name.removesuffix('.weight')}"
            if any(path in part.linears for part in parts):
                layer = plan.linears[path]
                self._layers[path] = layer.scheme, quantize_weight(weight, layer, compute)
        self._scales = [attention_scales(a, spec.head_dim, compute) for a in plan.attentions.get(call.path, ())]

    def touched(self, part: Part) -> bool:
        """Whether the part quantizes anything in it."""
        return self.call.path in part.attentions or any(path in part.linears for path in self._layers)

    def run(self, values: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        """Its outputs, by their names in the model, with a part of the plan carried out."""
        names = [tensor.name for tensor in self.call.kind.inputs]
        activations = dict(zip(names, [values[name] for name in self.call.inputs], strict=True))
        seen = 0  # attentions

        def replace(node: fx.Node, arguments: Sequence[Any]) -> Tensor | None:
            nonlocal seen
            if node.target is _LINEAR:
                return self._linear(node, arguments, part)
            if node.target is _ATTENTION and self.call.path in part.attentions:
                seen += 1
                q, k, v = arguments[:3]
                mask = arguments[3] if len(arguments) > 3 else None
                made = simulate_attention(q, k, v, self._scales[seen - 1], mask)
                return made.transpose(1, 2).contiguous().transpose(1, 2)  # as SDPA lays it out: it is viewed next
            return None

        made = self._program.run(activations, self._weights, replace=replace if self.touched(part) else None)
        return dict(zip(self.call.outputs, made, strict=True))

    def _linear(self, node: fx.Node, arguments: Sequence[Any], part: Part) -> Tensor | None:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        path = f"{self.call.path}.{self._program.names[weight.name].removesuffix('.weight')}"
        if path not in part.linears:
            return None
        scheme, tensors = self._layers[path]
        made = simulate(arguments[0], tensors, scheme)
        bias = arguments[2] if len(arguments) > 2 else None
        return made if bias is None else made + bias


class _Run:
    """One sample: the exact chain, and of every part the values that differ from it."""

    def __init__(self, sample: Mapping[str, Tensor], parts: Sequence[Part]):
        self.exact: Values = dict(sample)
        self._parts = parts
        self.changed: list[Values] = [{} for _ in parts]
        self.local: list[list[Distance] | None] = [[] for _ in parts]

    def step(self, call: _Quantized) -> None:
        exact = call.run(self.exact, Part())
        for index, (part, changed) in enumerate(zip(self._parts, self.changed, strict=True)):
            moved = any(name in changed for name in call.call.inputs)
            if not moved and not call.touched(part):
                continue
            made = call.run({**self.exact, **changed}, part)
            local = self.local[index]
            if moved and call.touched(part):
                self.local[index] = None
            elif not moved and local is not None:
                local += [Distance.of(made[name], exact[name]) for name in made]
            changed |= made
        self.exact |= exact

    def forget(self, names: Sequence[str]) -> None:
        for values in (self.exact, *self.changed):
            for name in names:
                values.pop(name, None)


def _effect(runs: Sequence[_Run], index: int) -> Effect:
    output = [Distance.of(run.changed[index].get("sample", run.exact["sample"]), run.exact["sample"]) for run in runs]
    local = [run.local[index] for run in runs]
    known = [Distance.worst(distances) for distances in local if distances]
    return Effect(tuple(output), tuple(known) if len(known) == len(local) else None)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf)


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)
