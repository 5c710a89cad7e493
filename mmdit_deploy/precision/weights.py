"""The weights file of a model with quantized layers: its layout, its tensors one by one, and reading them back.

Weights lie where those of a plain file do, under the same keys, each in its own type:

    conditioning … | all modulations' weights, their blocks' scales, their biases | img_embed … | blocks … | scales

A linear layer's parts (Q, K and V) stay one span. Scales by block of inputs, which are large, follow their weight, so
that writing holds one parameter in memory; those of modulations follow all modulations' weights, which stay one span.
What else belongs to a quantized layer is a few bytes a row and comes last, sorted by name: the modulations' row factors
are one span too. Wherever a tensor would not be aligned to its type, a few zero bytes called ``padding.N`` come before
it; no real model has odd enough sizes for one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit_deploy.checkpoint.convert import convert
from mmdit_deploy.checkpoint.keys import Parameter, Part, parameters
from mmdit_deploy.checkpoint.safetensors_file import SafetensorsFile
from mmdit_deploy.checkpoint.weights import WeightSource, read_parameter
from mmdit_deploy.checkpoint.writer import Layout, plan_layout
from mmdit_deploy.model import calls
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.precision.plan import LinearPlan, PrecisionPlan
from mmdit_deploy.precision.quantize import attention_scales, dequantize, quantize_weight
from mmdit_deploy.precision.roles import linears, role_of
from mmdit_deploy.precision.schemes import Scheme, stored
from mmdit_deploy.spec import ModelSpec

_PADDING = "padding."
_SCALES = ("weight_scale", "weight_scale_2", "channel_scale", "pre_quant_scale")  # what a weight is worth
_BY_ROW = ("channel_scale", "weight_scale")  # have a row for each of the weight's, where they are no scalars


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Args:
        path: of the parameter that it is or belongs to, or of the call of an attention.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: str


def planned_layout(spec: ModelSpec, plan: PrecisionPlan, metadata: Mapping[str, str] | None = None) -> Layout:
    """Where every tensor lies in the weights file of a bundle; that of a plain plan is `weights_layout`'s.

    Raises:
        ValueError: the plan names a layer that the model lacks, or whose inputs are no multiple of its scheme's block.
    """
    padded: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    end = 0
    for entry in _entries(spec, plan):
        missing = -end % entry.dtype.itemsize
        if missing:
            padded.append((f"{_PADDING}{len(padded)}", torch.uint8, (missing,)))
        padded.append((entry.key, entry.dtype, entry.shape))
        end += missing + _nbytes(entry)
    return plan_layout(padded, metadata)


def stream_planned(spec: ModelSpec, source: WeightSource, plan: PrecisionPlan) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `planned_layout` in its order, quantized or converted one parameter at a time.

    Raises:
        CheckpointError: NaN, Inf, or a value that the compute type cannot hold; it names the key.
        ValueError: as `planned_layout`, or the plan lacks what calibration finds.
    """
    compute = _compute(plan)
    parts = {part.key: (p, part) for p in parameters(spec) for part in p.parts}
    linear_of = {parameter.path: path for path, parameter in linears(spec).items() if path in plan.linears}
    waiting = _attentions(spec, plan)  # made, but not written yet
    for key, info in planned_layout(spec, plan).tensors.items():
        if key.startswith(_PADDING):
            yield key, torch.zeros(info.shape, dtype=info.dtype)
        elif key in waiting:
            yield key, waiting.pop(key)
        elif (path := linear_of.get(parts[key][0].path)) is not None:
            waiting |= _quantized(parts[key][0], path, source, plan.linears[path], compute)
            yield key, waiting.pop(key)
        else:
            yield key, convert(source.part(parts[key][1]), compute, key)


def planned_call_bytes(spec: ModelSpec, plan: PrecisionPlan) -> dict[str, int]:
    """Bytes of weights by call path, with all that belongs to quantized layers; 0 where a call has none."""
    counts = Counter({call.path: 0 for call in calls(spec)})
    for entry in _entries(spec, plan):
        counts[call_of(entry.path)] += _nbytes(entry)
    return dict(counts)


class QuantizedWeights:
    """Canonical tensors in fp32, from the weights file of a bundle with quantized layers: what these are worth.

    Args:
        file: it, open.
        schemes: how linear layers are quantized, by path, as the file's plan has them.
        description: where the weights come from, in words.
    """

    def __init__(self, spec: ModelSpec, file: SafetensorsFile, schemes: Mapping[str, Scheme], description: str):
        self.description = description
        self._file, self._schemes = file, schemes
        self._rows = {
            part.key: (path, rows)
            for path, parameter in linears(spec).items()
            if path in schemes
            for part, rows in _rows(parameter)
        }

    def part(self, part: Part) -> Tensor:
        if part.key not in self._rows:
            return self._file.read(part.key).float()
        path, rows = self._rows[part.key]
        tensors = {"weight": self._file.read(part.key)}
        for name in _SCALES:
            if f"{path}.{name}" in self._file.tensors:
                tensors[name] = self._file.read(f"{path}.{name}")
        for name in _BY_ROW:
            if name in tensors and tensors[name].dim():
                tensors[name] = tensors[name][rows.start : rows.stop]
        return dequantize(tensors, self._schemes[path]).reshape(part.shape)


def _entries(spec: ModelSpec, plan: PrecisionPlan) -> list[_Entry]:
    """The file's tensors in order."""
    compute, table = _compute(plan), linears(spec)
    unknown = sorted(plan.linears.keys() - table.keys())
    if unknown:
        raise ValueError(f"{spec.name} has no linear layer {', '.join(unknown)}")
    linear_of = {parameter.path: path for path, parameter in table.items()}
    entries: list[_Entry] = []
    of_modulations: list[_Entry] = []  # scales of their blocks, until all their weights are there
    last: list[_Entry] = []
    for parameter in parameters(spec):
        path = linear_of.get(parameter.path)
        modulates = path is not None and role_of(path) == "modulation"
        if not modulates:
            entries += of_modulations
            of_modulations = []
        if path is None or path not in plan.linears:
            entries += [_Entry(p.key, compute, p.shape, parameter.path) for p in parameter.parts]
            continue
        rows, columns = parameter.shape
        weight, *others = stored(plan.linears[path].scheme, rows, columns, compute)
        entries += [_Entry(p.key, weight.dtype, (p.shape[0], weight.shape[1]), parameter.path) for p in parameter.parts]
        for other in others:
            place = last if len(other.shape) < 2 else of_modulations if modulates else entries
            place.append(_Entry(f"{path}.{other.name}", other.dtype, other.shape, parameter.path))
    last += [_Entry(k, t.dtype, (), k.partition(".attention.")[0]) for k, t in _attentions(spec, plan).items()]
    # Of one name they stay in the model's order.
    return entries + of_modulations + sorted(last, key=lambda e: (-e.dtype.itemsize, e.key.rpartition(".")[2]))


def _quantized(
    parameter: Parameter, path: str, source: WeightSource, plan: LinearPlan, compute: torch.dtype
) -> dict[str, Tensor]:
    """A layer's tensors by key, its weight by the rows of its parts."""
    tensors = quantize_weight(read_parameter(source, parameter, torch.float32), plan, compute)
    weight = tensors.pop("weight")
    made = {part.key: weight[rows.start : rows.stop] for part, rows in _rows(parameter)}
    return made | {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def _attentions(spec: ModelSpec, plan: PrecisionPlan) -> dict[str, Tensor]:
    """The scales of FP8 attentions by key."""
    made: dict[str, Tensor] = {}
    for call, attentions in plan.attentions.items():
        for i, amax in enumerate(attentions):
            scales = attention_scales(amax, spec.head_dim, _compute(plan))
            made |= {f"{call}.attention.{i}.{x}_scale": s for x, s in zip("qkv", scales, strict=True)}
    return made


def _rows(parameter: Parameter) -> Iterator[tuple[Part, range]]:
    """A parameter's parts, and the rows of it that they are."""
    start = 0
    for part in parameter.parts:
        yield part, range(start, start + part.shape[0])
        start += part.shape[0]


def _compute(plan: PrecisionPlan) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, plan.precision.dtype)
    return dtype


def _nbytes(entry: _Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize
