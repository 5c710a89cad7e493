"""The architecture of tensors that no config.json describes, and what a user should know of how it was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mmdit_deploy.checkpoint.key_tables import KeyTable
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import POSITION_TABLE, Shapes, family_of, spec_from_config
from mmdit_deploy.spec import ModelSpec

_AS_PUBLISHED = "as in published models; the config.json of a diffusers folder would say"


def infer_spec(table: KeyTable, shapes: Shapes, *, where: str, name: str) -> ModelSpec:
    """What the tensors of one transformer say about its architecture; what they do not say is as published.

    Args:
        table: the family and layout that all its keys fit.
        shapes: by key in the layout.
        where: how to name the checkpoint in messages.
        name: what to call the model.

    Raises:
        CheckpointError: tensors that say it are missing, or their shapes are those of no such model.
    """
    family = table.family
    cause: Exception
    try:
        config = family.infer_config(table.canonical_shapes(shapes))
        return spec_from_config({"_class_name": family.config_class, **config}, name)
    except CheckpointError as error:
        cause, received = error, f"{error.rule.removeprefix('config.json: ')}: {error.received}"
    except KeyError as error:
        cause, received = error, f"{len(shapes)} tensors, without that of {error} (diffusers' name)"
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        cause, received = error, f"tensors of other shapes ({error})"
    raise CheckpointError(
        f"{where} must hold all of a {family.title} model: its tensors say what the architecture is",
        received=received,
        fix="get the file again; if it is one of several, pass the folder that holds them and config.json",
    ) from cause


def recognized(spec: ModelSpec, table: KeyTable) -> str:
    """What a file was recognized as: ``FLUX.1, original layout, by its tensors: the architecture of flux1-dev``."""
    twins = _twins(spec)
    return f"{table.title}, by its tensors" + (f": the architecture of {' and '.join(twins)}" if twins else "")


def undecided(spec: ModelSpec, shapes: Shapes) -> Mapping[str, str]:
    """The fields that these tensors do not tell, and what was taken instead, in words."""
    family = family_of(spec)
    # A buffer that a file may have is there to tell what parameters do not.
    return {} if set(family.buffers) & set(shapes) else family.undecided


def decided(spec: ModelSpec, shapes: Shapes, preset: ModelSpec) -> ModelSpec:
    """The architecture of tensors, with what they do not tell as in a preset of the same family."""
    if spec.family != preset.family:
        return spec
    return dataclasses.replace(spec, **{field: getattr(preset, field) for field in undecided(spec, shapes)})


def assumed(spec: ModelSpec, shapes: Shapes, preset: ModelSpec | None = None) -> tuple[str, ...]:
    """What tensors cannot tell of a model, and what was taken instead; most of it only of unpublished ones.

    Args:
        preset: that said what is undecided, if one did.
    """
    family = family_of(spec)
    if preset is not None and preset.family == spec.family:
        taken = {field: getattr(spec, field) for field in undecided(spec, shapes)}
        notes = [f"taken from the preset {preset.name}: {field} is {value}" for field, value in taken.items()]
    else:
        notes = [f"assumed: {words}" for words in undecided(spec, shapes).values()]
    if _twins(spec):
        return tuple(notes)
    if spec.rope_axes and spec.head_dim not in {preset.head_dim for preset in family.presets}:
        axes = ", ".join(map(str, spec.rope_axes))
        notes.append(f"assumed: RoPE's axes take {axes} channels of a head of {spec.head_dim}, {_AS_PUBLISHED}")
    if not spec.qk_norm:
        notes.append(f"assumed: heads are {spec.head_dim} wide, {_AS_PUBLISHED}")
    if spec.pos_max_size and not {POSITION_TABLE, family.buffers[POSITION_TABLE]} & set(shapes):
        notes.append(f"assumed: positions are cropped from a {spec.pos_max_size}² grid, {_AS_PUBLISHED}")
    return tuple(notes)


def _twins(spec: ModelSpec) -> list[str]:
    """The published models of this very architecture."""
    return [
        preset.name
        for preset in family_of(spec).presets
        if dataclasses.replace(preset, name=spec.name, pos_table=spec.pos_table) == spec
    ]
