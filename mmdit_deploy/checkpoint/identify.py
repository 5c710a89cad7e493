"""Whose model a file holds, and in which layout: by its keys alone, never by its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mmdit_deploy.checkpoint.components import Component, split_components
from mmdit_deploy.checkpoint.foreign import refuse_foreign
from mmdit_deploy.checkpoint.key_tables import KEY_TABLES, KeyTable
from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.checkpoint.weight_files import name_some
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import FAMILIES

_CLOSEST = 3  # families that a refusal lists


@dataclass(frozen=True)
class Identity:
    """What a file was found to hold.

    Args:
        table: the family and the layout.
        names: the file's key of each of the transformer's tensors, by its key in the layout.
        ignored: components that are not the transformer.
    """

    table: KeyTable
    names: Mapping[str, str]
    ignored: tuple[Component, ...]


def identify(tensors: Mapping[str, TensorInfo], where: str) -> Identity:
    """Finds the one family and layout that every key of the transformer fits.

    Args:
        tensors: of one file, by key.
        where: how to name the file in messages.

    Raises:
        CheckpointError: none fits, or more than one; the closest are listed, with the keys that did not fit.
    """
    model, ignored = split_components(tensors)
    fitting = [table for table in KEY_TABLES if model and all(map(table.spelled, model.values()))]
    if len(fitting) != 1:
        raise _unknown(tuple(model.values()), fitting, ignored, where)
    (table,) = fitting
    names: dict[str, str] = {}
    for name, key in model.items():
        spelled = table.spelled(key) or key
        if spelled in names:
            raise CheckpointError(
                f"{where} must hold every tensor once",
                received=f"{quote(names[spelled])} and {quote(name)}",
                fix="get the file again, or save it again with the program that wrote it",
            )
        names[spelled] = name
    return Identity(table, names, ignored)


def _unknown(
    model: Collection[str], fitting: list[KeyTable], ignored: tuple[Component, ...], where: str
) -> CheckpointError:
    titles = ", ".join(family.title for family in FAMILIES.values())
    rule = f"{where} must hold the tensors of one model of {titles}"
    if not model:
        held = ", ".join(map(str, ignored)) or "no tensors"
        return CheckpointError(rule, received=held, fix="pass the file that the transformer is in")
    if not fitting and (refusal := refuse_foreign(model, rule)):
        return refusal
    counts = {table: sum(table.spelled(key) is not None for key in model) for table in KEY_TABLES}
    closest = sorted((table for table in KEY_TABLES if counts[table]), key=lambda table: -counts[table])[:_CLOSEST]
    listed = "; ".join(f"{table.title}: {counts[table]} of {len(model)} keys fit" for table in closest)
    if fitting:
        received = f"keys that fit several ({listed}), e.g. {name_some(model, 3)}"
    elif closest:
        unfit = [key for key in model if closest[0].spelled(key) is None]
        received = f"{listed}; not of {closest[0].title}: {name_some(unfit)}"
    else:
        received = f"{len(model)} keys, of which none fits any: {name_some(model)}"
    return CheckpointError(
        rule,
        received=received,
        fix="pass a whole checkpoint as it was published: of one in several files, the folder that holds them and "
        "config.json; a variant with tensors of its own is another model",
    )
