"""From a recipe and what calibration saw, or from recorded scales, to the plan of every quantized layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmdit_deploy.calibration.scales import input_amax
from mmdit_deploy.calibration.scales_file import Scales
from mmdit_deploy.calibration.smoothing import smoothing_factors
from mmdit_deploy.calibration.statistics import LinearStatistics, Statistics
from mmdit_deploy.checkpoint.keys import Parameter
from mmdit_deploy.checkpoint.weights import WeightSource, read_parameter
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import LinearPlan, PrecisionPlan, QuantizationRecipe, Scheme, linears, role_of
from mmdit_deploy.precision.structure import attentions, planned_schemes
from mmdit_deploy.spec import ModelSpec, Precision


def needs_statistics(recipe: QuantizationRecipe) -> bool:
    """Whether a recipe takes numbers that calibration finds: it quantizes inputs with them, or smooths."""
    return recipe.fp8_attention or any(map(_calibrated, recipe.schemes.values()))


def plan_quantization(
    spec: ModelSpec,
    precision: Precision,
    recipe: QuantizationRecipe,
    statistics: Statistics | None,
    source: WeightSource,
) -> PrecisionPlan:
    """The plan of what a recipe quantizes, with the numbers that calibration found.

    A layer whose inputs are no multiple of a scheme's block stays in the compute type:
    `mmdit_deploy.precision.structure.indivisible` names these.

    Args:
        statistics: None where nothing was calibrated, for `needs_statistics` says that nothing has to be.
        source: of the weights, which smoothing looks at; read one layer at a time, and only where a scheme smooths.

    Raises:
        ValueError: there are no statistics, and the recipe needs some.
    """
    parameters, found = linears(spec), statistics or Statistics()
    if statistics is None and needs_statistics(recipe):
        raise ValueError("the recipe takes numbers that calibration finds: there are no statistics")
    return PrecisionPlan(
        precision,
        {
            path: _linear(scheme, parameters[path], found.linears[path], source, recipe)
            if _calibrated(scheme)
            else LinearPlan(scheme)
            for path, scheme in planned_schemes(spec, recipe).items()
        },
        {call: found.attentions[call] for call in attentions(spec)} if recipe.fp8_attention else {},
    )


def plan_recorded(spec: ModelSpec, precision: Precision, recipe: QuantizationRecipe, scales: Scales) -> PrecisionPlan:
    """The plan of what a recipe quantizes, with numbers that were recorded before.

    What a budget or an fp16 plan took out of the recorded plan is left in the compute type again.

    Args:
        scales: of this model, as `mmdit_deploy.calibration.scales_file.read_scales` checks. They may hold more layers.

    Raises:
        UsageError: a layer or an attention has no scales there, or those of another scheme.
    """
    recorded_roles, bf16 = _left_by_budget(scales.record), recorded_bf16_attentions(scales.record)
    layers, operands = {}, {}
    for path, scheme in planned_schemes(spec, recipe).items():
        recorded = scales.linears.get(path)
        if recorded is None and recorded_roles.get(role_of(path)) == scheme.name:
            continue
        if recorded is None or recorded.scheme != scheme:
            raise _unrecorded(path, scheme.name, "nothing" if recorded is None else recorded.scheme.name)
        layers[path] = recorded
    for call in attentions(spec) if recipe.fp8_attention else ():
        if call in scales.attentions:
            operands[call] = scales.attentions[call]
        elif call not in bf16 and recorded_roles.get("fp8_attention") is not True:
            raise _unrecorded(f"the attention of {call}", "fp8", "nothing")
    return PrecisionPlan(precision, layers, operands)


def recorded_bf16_attentions(record: Mapping[str, Any]) -> frozenset[str]:
    """Calls whose attention had no FP8 scales, because an fp16 plan computed it in bf16.

    Args:
        record: of recorded scales: of their own calibration, or taken over from others.
    """
    found: set[str] = set()
    for name in ("fp16_plan", "calibration"):
        calls = _table(record.get(name)).get("bf16_attentions")
        found |= {call for call in calls if isinstance(call, str)} if isinstance(calls, list) else set()
    return frozenset(found)


def _left_by_budget(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe that a budget took layers out of; empty where there was no budget."""
    return _table(record.get("recipe")) if "budget" in record else {}


def _table(value: Any) -> Mapping[str, Any]:
    """What a file that anyone may have written says: a table, or nothing."""
    return value if isinstance(value, dict) else {}


def _calibrated(scheme: Scheme) -> bool:
    return scheme.smooth or scheme.activations in ("tensor", "block")


def _linear(
    scheme: Scheme,
    parameter: Parameter,
    seen: LinearStatistics,
    source: WeightSource,
    recipe: QuantizationRecipe,
) -> LinearPlan:
    factors = None
    if scheme.smooth:
        weights = read_parameter(source, parameter, torch.float32).abs().amax(0)
        factors = smoothing_factors(seen.channels, weights, recipe.smoothing)
    if scheme.activations == "block":
        # What lies beyond it saturates twice, in its value and in its block's scale: nothing may.
        return LinearPlan(scheme, seen.amax)
    if scheme.activations != "tensor":
        return LinearPlan(scheme, None, factors)
    if factors is None:
        return LinearPlan(scheme, input_amax(seen, recipe, scheme.weights))
    # Smoothed channels have no histogram, and no outliers that a clip would be for.
    return LinearPlan(scheme, float((seen.channels * factors).max()), factors)


def _unrecorded(what: str, scheme: str, recorded: str) -> UsageError:
    return UsageError(
        f"scales are reused for what they were recorded for: {what} is to be in {scheme}",
        received=f"scales of {recorded}",
        fix="take the recipe that they were recorded with, or calibrate again without --scales",
    )
