"""What a recipe means for a model, before anything was calibrated: enough to know every tensor and its size."""

from __future__ import annotations

from mmdit_deploy.precision.plan import AttentionScales, LinearPlan, PrecisionPlan
from mmdit_deploy.precision.recipe import QuantizationRecipe
from mmdit_deploy.precision.roles import linears, role_of
from mmdit_deploy.precision.schemes import Scheme
from mmdit_deploy.spec import ModelSpec, Precision


def planned_schemes(spec: ModelSpec, recipe: QuantizationRecipe) -> dict[str, Scheme]:
    """The scheme of each linear layer that the recipe quantizes, by path, in the order of the weights file.

    A layer whose inputs are no multiple of a scheme's block stays in the compute type, and one that nothing runs.
    """
    return {path: scheme for path, (scheme, whole) in _named(spec, recipe).items() if whole}


def indivisible(spec: ModelSpec, recipe: QuantizationRecipe) -> tuple[str, ...]:
    """Linear layers that the recipe names and that stay in the compute type, for their inputs are no whole blocks."""
    return tuple(path for path, (_, whole) in _named(spec, recipe).items() if not whole)


def _named(spec: ModelSpec, recipe: QuantizationRecipe) -> dict[str, tuple[Scheme, bool]]:
    """The layers whose role has a scheme, and whether their inputs are whole blocks of it."""
    dead = unread(spec)
    return {
        path: (scheme, parameter.shape[1] % (scheme.block or 1) == 0)
        for path, parameter in linears(spec).items()
        if path not in dead and (scheme := recipe.schemes.get(role_of(path))) is not None
    }


def unread(spec: ModelSpec) -> frozenset[str]:
    """Linear layers that a checkpoint has and the model does not run: the last ones of a text that nothing reads.

    They are Qwen-Image's; no graph has them, and no calibration sees their inputs.
    """
    return frozenset(
        f"blocks.{i}.txt.{layer}"
        for i, block in enumerate(spec.blocks)
        if block.text_unread
        for layer in ("attn_out", "mlp.up", "mlp.down")
    )


def attentions(spec: ModelSpec) -> dict[str, int]:
    """How many attentions each block has, by its call."""
    joint = {f"blocks.{i}": block.attentions for i, block in enumerate(spec.blocks)}
    return {**joint, **{f"single_blocks.{i}": 1 for i in range(spec.single_depth)}}


def structure(spec: ModelSpec, precision: Precision, recipe: QuantizationRecipe | None) -> PrecisionPlan:
    """A plan with every tensor in it, and numbers that stand for those that calibration will find.

    Args:
        recipe: None where nothing is quantized.
    """
    if recipe is None:
        return PrecisionPlan(precision)
    unknown = AttentionScales(1.0, 1.0, 1.0)
    return PrecisionPlan(
        precision,
        {path: LinearPlan(scheme) for path, scheme in planned_schemes(spec, recipe).items()},
        {call: (unknown,) * count for call, count in attentions(spec).items()} if recipe.fp8_attention else {},
    )
