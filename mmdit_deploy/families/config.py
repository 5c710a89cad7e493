"""From a diffusers `config.json` to a `ModelSpec`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdit_deploy.errors import CheckpointError, SpecError
from mmdit_deploy.families.family import Family
from mmdit_deploy.spec import ModelSpec

_REPAIR = "repair config.json"


def spec_from_config(config: Mapping[str, Any], name: str, families: Sequence[Family]) -> ModelSpec:
    """Read the architecture that a checkpoint declares.

    Args:
        config: the parsed ``config.json``. Fields that begin with ``_`` are diffusers' own bookkeeping.
        name: what to call the model.
        families: those that it may be of.

    Raises:
        CheckpointError: the class or a field is unknown, or a value is not what this family can have.
    """
    class_name = config.get("_class_name")
    family = next((f for f in families if f.config_class == class_name), None)
    if family is None:
        raise CheckpointError(
            f"the config's _class_name is one of {', '.join(f.config_class for f in families)}",
            received=repr(class_name),
            fix="pass the transformer folder of a checkpoint of " + ", ".join(f.title for f in families),
        )
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k not in family.config_ignored}
    unknown = sorted(set(fields) - set(family.config_defaults))
    if unknown:
        raise CheckpointError(
            f"a {class_name} config has the fields {', '.join(family.config_defaults)}",
            received=f"unknown {', '.join(unknown)}",
            fix="a field that is not understood may change the model: check which diffusers version wrote it",
        )
    c = {**family.config_defaults, **fields}
    for key, default in family.config_defaults.items():
        _check_field(key, c[key], default, family)
    try:
        return ModelSpec(name=name, family=family.name, **family.spec_fields(c))
    except SpecError as error:
        raise CheckpointError(f"config.json: {error.rule}", received=error.received, fix=error.fix) from error


def config_of(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """The config that `spec_from_config` reads the architecture from.

    What the spec does not say is as in the family's published models.
    """
    same = {theirs: getattr(spec, ours) for theirs, ours in family.same_fields.items()}
    return {**family.config_defaults, **same, **family.config_fields(spec)}


def _check_field(key: str, value: Any, default: Any, family: Family) -> None:
    """A value is of its default's kind, and one that we know."""
    if key in family.config_choices:
        choices = family.config_choices[key]
        if not any(value == choice and isinstance(value, type(choice)) for choice in choices):
            raise CheckpointError(
                f"{key} of a {family.config_class} is {' or '.join(map(repr, choices))}",
                received=repr(value),
                fix="this variant is not supported",
            )
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise CheckpointError(f"{key} is true or false", received=repr(value), fix=_REPAIR)
    elif isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
            raise CheckpointError(f"{key} is a list of whole numbers", received=repr(value), fix=_REPAIR)
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{key} is a positive number", received=repr(value), fix=_REPAIR)
    elif value is None and (default is None or key in family.config_nullable):
        pass
    elif type(value) is not int or value < 1:
        raise CheckpointError(f"{key} is a whole number of at least 1", received=repr(value), fix=_REPAIR)
