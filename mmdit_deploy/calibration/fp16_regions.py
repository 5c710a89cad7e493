"""The regions of a function that may be kept in fp32 where its error in fp16 is too large.

From cheap to dear: a residual stream, norms, and gates and modulation cost no kernels of their own; a linear layer's
product is then computed in fp32. What an attention reads or makes is no region: it is never computed in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from mmdit_deploy.calibration.value_labels import labels, linear_of
from mmdit_deploy.graph.named_functions import GATED_RESIDUAL, MODULATE
from mmdit_deploy.graph.precision.wide_values import SIXTEEN_BIT, decide, is_parameter

_NORMS = ("LayerNormalization", "RMSNormalization")
_MOVES = frozenset("Cast Concat Expand Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split())


@dataclass(frozen=True)
class Region:
    """Values that are kept in fp32 together.

    Args:
        label: in words.
        values: by name.
        stream: whether it is a residual stream, from where it enters to where it leaves.
    """

    label: str
    values: frozenset[str]
    stream: bool = False


def regions(function: ir.Function, named: Collection[ir.Value]) -> tuple[Region, ...]:
    """Those of a fused function.

    Args:
        named: the values that a plan may name.
    """
    words = labels(function)
    found = [*_streams(function, words), *_norms(function), *_modulation(function)]
    grouped = frozenset[str]().union(*(region.values for region in found))
    rest = [
        v
        for v in named
        if v.name not in grouped and v.producer() is not None and v.producer().op_type not in _MOVES  # type: ignore[union-attr]
    ]
    found += [Region(words[v.name], frozenset({v.name})) for v in rest if v.name in words]
    return tuple(region for region in found if region.values and not _reaches_attention(function, region))


def _streams(function: ir.Function, words: dict[str, str]) -> Iterator[Region]:
    """Each residual stream, from where it enters to where it leaves."""
    for out in function.outputs:
        value: ir.Value | None = out
        stream, residuals = [], 0
        while value is not None and (node := value.producer()) is not None and _is_sum(node):
            stream.append(value)
            residuals += node.op_type == GATED_RESIDUAL
            value = node.inputs[0]
        if residuals and value is not None:
            stream.append(value)
            label = words[value.name or ""].removesuffix(", entering")
            yield Region(label, frozenset(v.name for v in stream if v.name), stream=True)


def _is_sum(node: ir.Node) -> bool:
    return node.op_type in (GATED_RESIDUAL, "Clip", "Identity", "Add") and linear_of(node.outputs[0]) is None


def _norms(function: ir.Function) -> Iterator[Region]:
    for op, label in zip(_NORMS, ("norms of the streams", "norms of Q and K"), strict=True):
        values = (n.outputs[0] for n in function if n.op_type == op)
        yield Region(label, frozenset(v.name for v in values if v.name and v.dtype in SIXTEEN_BIT))


def _modulation(function: ir.Function) -> Iterator[Region]:
    """Scales, shifts and gates, from where they enter."""
    values: set[ir.Value] = set()
    for node in function:
        if node.op_type in (MODULATE, GATED_RESIDUAL):
            ahead = list(node.inputs[1:] if node.op_type == MODULATE else node.inputs[1:2])
            while ahead:
                value = ahead.pop()
                if value is None or value.dtype not in SIXTEEN_BIT or value in values:
                    continue
                values.add(value)
                producer = value.producer()
                if producer is not None and producer.op_type in (*_MOVES, "Where"):
                    ahead += producer.inputs
    yield Region("gates and modulation", frozenset(v.name for v in values if v.name and not is_parameter(v)))


def _reaches_attention(function: ir.Function, region: Region) -> bool:
    """Whether an attention would be computed in bf16, which is less exact than fp16."""
    return bool(decide(function, region.values).bf16)
