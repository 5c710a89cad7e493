"""Which model `mmdit-export` exports: a checkpoint, a preset, a depth or a recipe's, and what is to be said of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint.folder import download_command
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
        spec = with_residuals(spec, whole_number("--controlnet", args.controlnet))
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
        spec, source = open_weights(checkpoint)
        if name is not None:
            _check_same(spec, preset(name))
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


def whole_number(option: str, text: str, what: str = "a number") -> int:
    """The number that an option was given.

    Args:
        what: what else it may be, for the message.

    Raises:
        UsageError: it is no number of at most five digits.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise UsageError(f"{option} is {what}", received=ascii(text)[:40], fix=f"e.g. {option} 4")
    return int(text)


def _depth(text: str) -> Any:
    """The number that a text says, or the text itself, which `from_depth` refuses in its own words."""
    try:
        return int(text)
    except ValueError:  # no number, or one of more digits than Python reads
        return text[:20]


def _check_same(spec: ModelSpec, expected: ModelSpec) -> None:
    """A checkpoint given together with a preset or recipe must be of that architecture."""
    ours, theirs = spec.to_json(), expected.to_json()
    differing = [k for k in ours if k not in ("name", "pos_table") and ours[k] != theirs[k]]
    if differing:
        raise UsageError(
            f"the checkpoint must be a {expected.name}, as the recipe or preset says",
            received=", ".join(f"{k} {ours[k]}, expected {theirs[k]}" for k in differing),
            fix="export it without --recipe or --preset",
        )
