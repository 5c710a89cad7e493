"""Which model `mmdit-export` exports: a checkpoint, a preset, a depth or a recipe's, and what is to be said of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint.folder import download_command
from mmdit_deploy.checkpoint.same import check_same
from mmdit_deploy.checkpoint.weights import RandomWeights, WeightSource, open_weights
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import preset, with_residuals
from mmdit_deploy.recipes import Recipe
from mmdit_deploy.spec import ModelSpec, from_depth

Choice = tuple[ModelSpec, WeightSource, tuple[str, ...]]


def choose_model(args: argparse.Namespace, recipe: Recipe | None) -> Choice:
    """The spec, with a ControlNet's residuals if asked for, its weights, and lines for the log.

    Raises:
        UsageError: the arguments contradict each other, or name no model.
        CheckpointError: the checkpoint is none that we read.
    """
    spec, source, notes = _checkpoint_or_random(args, recipe)
    if args.controlnet is not None:
        with_residuals(spec, 1)  # first of all, does the family take any?
        spec = with_residuals(spec, whole_number("--controlnet", args.controlnet, f"a whole number, 1 to {spec.depth}"))
    return spec, source, notes


def _checkpoint_or_random(args: argparse.Namespace, recipe: Recipe | None) -> Choice:
    name = args.preset or (recipe.preset if recipe else None)
    checkpoint: str | Path | None = args.checkpoint
    notes: tuple[str, ...] = ()
    if checkpoint is None and recipe is not None:
        if isinstance(recipe.checkpoint, Path):
            checkpoint = recipe.checkpoint
        elif recipe.checkpoint is not None:
            notes = (f"recipe {recipe.name} is for {recipe.checkpoint}; {download_command(recipe.checkpoint)}",)
    if checkpoint is not None:
        if args.depth is not None:
            raise UsageError(
                "a checkpoint says its own depth",
                received=f"CHECKPOINT and --depth {args.depth}",
                fix="drop --depth, or drop the checkpoint to export random weights",
            )
        if args.seed is not None:
            raise UsageError(
                "a seed makes random weights",
                received=f"CHECKPOINT and --seed {args.seed}",
                fix="drop --seed, or drop the checkpoint",
            )
        expected = preset(name) if name is not None else None
        spec, source = open_weights(checkpoint, expected)
        if expected is not None:
            check_same(
                spec,
                expected,
                f"the checkpoint must be a {expected.name}, as the recipe or preset says",
                fix="export it without --recipe or --preset",
                besides=("pos_table",),  # the preset's is the formula's; a checkpoint may have its own
            )
        return spec, source, source.notes
    if args.depth is not None:
        return from_depth(_depth(args.depth)), RandomWeights(args.seed or 0), ()
    if name is not None:
        return preset(name), RandomWeights(args.seed or 0), notes
    raise UsageError(
        "say what to export",
        received="no CHECKPOINT, --preset, --depth or --recipe",
        fix="e.g. mmdit-export --depth 24 --fp16",
    )


def whole_number(option: str, text: str, what: str) -> int:
    """The number that an option was given; whether it is in range is not looked at.

    Args:
        what: what the option is, for the message.

    Raises:
        UsageError: it is no whole number of at most five digits.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise UsageError(f"{option} is {what}", received=ascii(text)[:40], fix=f"e.g. {option} 1")
    return int(text)


def _depth(text: str) -> Any:
    """The number that a text says, or the text itself, which `from_depth` refuses in its own words."""
    try:
        return int(text)
    except ValueError:  # no number, or one of more digits than Python reads
        return text[:20]
