"""From a recipe and what calibration saw, or from recorded scales, to the plan of every quantized layer."""

from __future__ import annotations

import torch

from mmdit_deploy.calibration.scales import input_amax
from mmdit_deploy.calibration.scales_file import Scales
from mmdit_deploy.calibration.smoothing import smoothing_factors
from mmdit_deploy.calibration.statistics import LinearStatistics, Statistics
from mmdit_deploy.checkpoint.keys import Parameter
from mmdit_deploy.checkpoint.weights import WeightSource, read_parameter
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import LinearPlan, PrecisionPlan, QuantizationRecipe, Scheme, linears
from mmdit_deploy.precision.structure import attentions, planned_schemes
from mmdit_deploy.spec import ModelSpec, Precision


def plan_quantization(
    spec: ModelSpec,
    precision: Precision,
    recipe: QuantizationRecipe,
    statistics: Statistics,
    source: WeightSource,
) -> PrecisionPlan:
    """The plan of what a recipe quantizes, with the numbers that calibration found.

    A layer whose inputs are no multiple of a scheme's block stays in the compute type:
    `mmdit_deploy.precision.structure.indivisible` names these.

    Args:
        source: of the weights, which smoothing looks at; read one layer at a time, and only where a scheme smooths.
    """
    parameters = linears(spec)
    return PrecisionPlan(
        precision,
        {
            path: _linear(scheme, parameters[path], statistics.linears[path], source, recipe)
            for path, scheme in planned_schemes(spec, recipe).items()
        },
        {call: statistics.attentions[call] for call in attentions(spec)} if recipe.fp8_attention else {},
    )


def plan_recorded(spec: ModelSpec, precision: Precision, recipe: QuantizationRecipe, scales: Scales) -> PrecisionPlan:
    """The plan of what a recipe quantizes, with numbers that were recorded before.

    Args:
        scales: of this model, as `mmdit_deploy.calibration.scales_file.read_scales` checks. They may hold more layers.

    Raises:
        UsageError: a layer or an attention has no scales there, or those of another scheme.
    """
    schemes = planned_schemes(spec, recipe)
    for path, scheme in schemes.items():
        recorded = scales.linears.get(path)
        if recorded is None or recorded.scheme != scheme:
            raise _unrecorded(path, scheme.name, "nothing" if recorded is None else recorded.scheme.name)
    wanted = attentions(spec) if recipe.fp8_attention else {}
    for call in wanted:
        if call not in scales.attentions:
            raise _unrecorded(f"the attention of {call}", "fp8", "nothing")
    return PrecisionPlan(
        precision,
        {path: scales.linears[path] for path in schemes},
        {call: scales.attentions[call] for call in wanted},
    )


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
