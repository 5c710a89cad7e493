"""What fp16 cannot hold: the values of calls whose measured range leaves no room below 65504."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mmdit_deploy.calibration.graph_values import GraphValues
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.graph.named_functions import GATED_RESIDUAL, MODULATE
from mmdit_deploy.graph.precision.wide_values import FP16_MAX

# Calibration sees few of the images that a model is to make: twice what it saw must fit. One more bit of range than was
# needed costs little (a residual stream in fp32), and a number that does not fit makes a black image.
HEADROOM = 2.0
MASK = "attention_mask"  # the range's own end, by construction
Ranges = Mapping[str, Mapping[str, float]]


def ranges_of(statistics: Statistics) -> dict[str, dict[str, float]]:
    """The largest magnitude of each value, by call."""
    return {call: {name: r.amax for name, r in ranges.items()} for call, ranges in statistics.values.items()}


@dataclass(frozen=True)
class TooLarge:
    """What a call must not compute in fp16.

    Args:
        values: by their names in the fused function.
        factors: by node that makes a product within itself which is too large, such as gate · x in a gated residual:
            one of its inputs, by name. Where that is read in fp32 the node computes in fp32.
    """

    values: frozenset[str]
    factors: Mapping[ir.Node, str]


def too_large(places: GraphValues, ranges: Mapping[str, float], headroom: float = HEADROOM) -> TooLarge:
    """What is too large for fp16 in a call.

    Args:
        ranges: the largest magnitude of values, by the name of the operator or of the activation.
        headroom: how many times that must fit.
    """
    masks = _masks(places.function)
    if any(v.name == MASK for v in places.function.outputs):
        return TooLarge(frozenset(), {})  # the call that makes it
    values, factors = set(), {}
    for name, amax in ranges.items():
        if amax * headroom <= FP16_MAX:
            continue
        value, holder = places.named(name), places.inside.get(name)
        if value is not None and value.name and _is_fp16(value) and value not in masks:
            values.add(value.name)
        elif value is None and holder is not None:
            factors[holder] = factor_of(holder)
    return TooLarge(frozenset(values), factors)


def factor_of(node: ir.Node) -> str:
    """The input that is read in fp32 where a product within a node is too large: the smallest, such as the gate."""
    factor = node.inputs[1 if node.op_type in (MODULATE, GATED_RESIDUAL) else 0]
    return (factor.name if factor is not None else None) or ""


def amax_by_value(places: GraphValues, ranges: Mapping[str, float]) -> dict[str, float]:
    """The largest magnitude of each value of the fused function that has one, in the function's order."""
    by_value: dict[str, float] = {}
    for name, amax in ranges.items():
        value = places.named(name)
        if value is not None and value.name and _is_fp16(value):
            by_value[value.name] = max(amax, by_value.get(value.name, 0.0))
    order = [v.name for v in _values(places.function)]
    return {name: by_value[name] for name in order if name in by_value}


def _is_fp16(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT16


def _values(function: ir.Function) -> Iterator[ir.Value]:
    yield from function.inputs
    for node in function:
        yield from node.outputs


def _masks(function: ir.Function) -> set[ir.Value | None]:
    """The mask of keys, and its expansions."""
    masks: set[ir.Value | None] = {v for v in function.inputs if v.name == MASK}
    for node in function:
        if node.op_type == "Expand" and node.inputs[0] in masks:
            masks |= set(node.outputs)
    return masks
