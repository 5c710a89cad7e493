"""The families of models that we know, as data: to add one, add a file like those here, and a line below."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmdit_deploy.errors import SpecError, UsageError
from mmdit_deploy.families.config import config_of as _config_of
from mmdit_deploy.families.config import spec_from_config as _spec_from_config
from mmdit_deploy.families.family import Family, Grid, Ids, Keys, Shapes
from mmdit_deploy.families.flux1 import FLUX1
from mmdit_deploy.families.flux2 import FLUX2
from mmdit_deploy.families.qwen_image import QWEN_IMAGE
from mmdit_deploy.families.sd3 import POSITION_TABLE, SD3
from mmdit_deploy.spec import ModelSpec

FAMILIES: Mapping[str, Family] = {f.name: f for f in (SD3, FLUX1, FLUX2, QWEN_IMAGE)}
PRESETS: Mapping[str, ModelSpec] = {spec.name: spec for f in FAMILIES.values() for spec in f.presets}


def family_of(spec: ModelSpec) -> Family:
    """The family that a spec names.

    Raises:
        SpecError: there is no such family.
    """
    if spec.family not in FAMILIES:
        raise SpecError(
            f"a family is one of {', '.join(FAMILIES)}",
            received=repr(spec.family),
            fix="re-export the bundle with this version",
        )
    return FAMILIES[spec.family]


def preset(name: str) -> ModelSpec:
    """Look an architecture up by name.

    Raises:
        UsageError: there is no such preset.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UsageError(
            f"a preset is one of {', '.join(PRESETS)}", received=repr(name), fix="name one, or use --depth N"
        ) from None


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read the architecture that a checkpoint declares.

    Args:
        config: the parsed ``config.json``. Fields that begin with ``_`` are diffusers' own bookkeeping.
        name: what to call the model.

    Raises:
        CheckpointError: the class or a field is unknown, or a value is not what this family can have.
    """
    return _spec_from_config(config, name, tuple(FAMILIES.values()))


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The fields of the ``config.json`` of diffusers' class for an architecture; not its name, ``_class_name``.

    Raises:
        SpecError: there is no such family.
    """
    return _config_of(spec, family_of(spec))


def with_residuals(spec: ModelSpec, residuals: int) -> ModelSpec:
    """The model as a ControlNet steers it: with one more input, its residuals.

    Args:
        residuals: how many the ControlNet makes, 1 to the number of joint blocks: its own number of blocks. Each is
            added after the blocks that it is for.

    Raises:
        UsageError: the family's models are exported without one, or there are too many or too few.
    """
    takers = [f.title for f in FAMILIES.values() if f.controlnet]
    if not family_of(spec).controlnet:
        raise UsageError(
            f"residuals of a ControlNet are inputs of {', '.join(takers)}",
            received=f"{spec.name}, a model of {family_of(spec).title}",
            fix="export it without",
        )
    if not 1 <= residuals <= spec.depth:
        raise UsageError(
            f"a ControlNet of {spec.name} has 1 to {spec.depth} residuals",
            received=str(residuals),
            fix="num_layers of the ControlNet's config.json says how many",
        )
    return dataclasses.replace(spec, name=f"{spec.name}-controlnet", residuals=residuals)


def position_ids(spec: ModelSpec, images: Sequence[Grid], txt_tokens: int) -> Ids:
    """Ids of a model's tokens, as its engines take them in ``img_ids`` and ``txt_ids``.

    Args:
        images: rows and columns, in tokens: of the image that is made, then of the reference images that are appended
            to it, for models that take any.
        txt_tokens: how many.

    Returns:
        fp32 arrays [img_tokens, axes] and [txt_tokens, axes]; models without RoPE read only the first.

    Raises:
        UsageError: there are reference images, and the model takes none.
    """
    family = family_of(spec)
    if not images or (len(images) > 1 and not family.references):
        raise UsageError(
            f"{family.title} takes one image" + (", then its references" if family.references else ""),
            received=f"{len(images)} images",
            fix="pass rows and columns of each image, the one that is made first",
        )
    return family.position_ids(images, txt_tokens)


__all__ = [
    "FAMILIES",
    "POSITION_TABLE",
    "PRESETS",
    "Family",
    "Grid",
    "Ids",
    "Keys",
    "Shapes",
    "config_of",
    "family_of",
    "position_ids",
    "preset",
    "spec_from_config",
    "with_residuals",
]
