"""A model as it lies in a checkpoint: what it is, and its canonical tensors out of whatever layout."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdit_deploy.checkpoint.components import Component
from mmdit_deploy.checkpoint.fit import Origin, check_fit, table_differs
from mmdit_deploy.checkpoint.folder import Checkpoint, open_checkpoint
from mmdit_deploy.checkpoint.foreign import refuse_quantized
from mmdit_deploy.checkpoint.identify import identify
from mmdit_deploy.checkpoint.infer import assumed, decided, infer_spec, recognized
from mmdit_deploy.checkpoint.key_tables import KeyLayout, KeyTable
from mmdit_deploy.checkpoint.keys import Parameter, Part, parameters
from mmdit_deploy.checkpoint.original_layout import from_original, stored_parts
from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.checkpoint.weight_files import SAFETENSORS_SUFFIXES, WEIGHTS_STEM, read_json_file
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import POSITION_TABLE, family_of, spec_from_config
from mmdit_deploy.spec import ModelSpec


class StoredModel:
    """The model of an open checkpoint; gives canonical tensors, one at a time.

    Attributes:
        spec: the architecture.
        layout: of the keys in the files.
        checkpoint: the open files.
        ignored: components in them that are not the transformer.
        description: where the weights come from, in words.
        notes: what a user should be told: what was recognized, ignored or assumed; a line each.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        layout: KeyLayout,
        names: Mapping[str, str],  # in the files, by key in the layout
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.layout = layout
        self.ignored: tuple[Component, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.description = f"checkpoint {checkpoint.path}"
        self._names = names
        self._places = {part.key: (p, i) for p in parameters(spec) for i, part in enumerate(p.parts)}

    def part(self, part: Part) -> Tensor:
        """One canonical tensor, in the dtype stored: a view of the mapped file, or a copy of one that is swapped.

        Raises:
            CheckpointError: the model has no such tensor.
        """
        if part.key not in self._places:
            raise CheckpointError(
                f"{self.checkpoint.path} must hold the tensor {quote(part.key)}",
                received=f"a {family_of(self.spec).title} model without it",
                fix="check that the checkpoint fits the architecture",
            )
        parameter, index = self._places[part.key]
        stored = [self.checkpoint.read(self._names[p.key]) for p in stored_parts(parameter, self.layout)]
        return (from_original(parameter, stored) if self.layout == "original" else stored)[index]

    def stored(self, parameter: Parameter) -> tuple[TensorInfo, ...]:
        """The tensors of the files that hold a parameter."""
        parts = stored_parts(parameter, self.layout)
        return tuple(self.checkpoint.tensors[self._names[part.key]] for part in parts)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The transformer's tensors, by their keys in the files."""
        return {name: self.checkpoint.tensors[name] for name in self._names.values()}


def open_model(path: str | os.PathLike[str], preset: ModelSpec | None = None) -> StoredModel:
    """Opens a checkpoint: a diffusers folder, or one safetensors file in any layout of a family that we know.

    Args:
        path: the folder or file. A folder's config.json says what the architecture is; of a file, its tensors do.
        preset: what the model is meant to be: says what tensors do not tell. Nothing else of it is checked here.

    Raises:
        CheckpointError: the files are broken or of another kind, or the tensors are not those of one architecture;
            missing, extra and mis-shaped keys are listed by name.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.config is None:
        return _open_file(checkpoint, preset)
    return _open_folder(checkpoint, checkpoint.config)


def _open_folder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> StoredModel:
    spec = spec_from_config(config, model_name(checkpoint.path))
    return _fitted(checkpoint, spec, "diffusers", {key: key for key in checkpoint.tensors}, "config.json")


def _open_file(checkpoint: Checkpoint, preset: ModelSpec | None) -> StoredModel:
    where, name = str(checkpoint.path), model_name(checkpoint.path)
    identity = identify(checkpoint.tensors, where)
    table, names = identity.table, identity.names
    config = _config_beside(checkpoint.path, table)
    if config is None:
        shapes = {key: checkpoint.tensors[in_file].shape for key, in_file in names.items()}
        spec = infer_spec(table, shapes, where=where, name=name)
        if preset is not None:
            spec = decided(spec, shapes, preset)
        notes = [recognized(spec, table), *assumed(spec, shapes, preset)]
        model = _fitted(checkpoint, spec, table.layout, names, "tensors")
    else:
        refuse_quantized(config, str(checkpoint.path.with_name("config.json")))
        notes = [f"{table.title}; its architecture is read from config.json beside it"]
        model = _fitted(checkpoint, spec_from_config(config, name), table.layout, names, "config.json beside")
    model.ignored = identity.ignored
    model.notes = (*notes, *(f"ignored: {component}" for component in identity.ignored))
    return model


def _config_beside(path: Path, table: KeyTable) -> dict[str, Any] | None:
    """The config.json of the folder that a file in diffusers' layout lies in, if it is of that family."""
    beside = path.with_name("config.json")
    if table.layout != "diffusers" or not beside.is_file():
        return None
    config = read_json_file(beside)
    return config if config.get("_class_name") == table.family.config_class else None


def _fitted(
    checkpoint: Checkpoint, spec: ModelSpec, layout: KeyLayout, names: Mapping[str, str], origin: Origin
) -> StoredModel:
    """The model, after checking that its tensors are those of its architecture."""
    tensors = {key: checkpoint.tensors[in_file] for key, in_file in names.items()}
    table = POSITION_TABLE if layout == "diffusers" else family_of(spec).buffers.get(POSITION_TABLE)
    if table in tensors and spec.pos_max_size and table_differs(checkpoint.read(names[table]), spec, names[table]):
        spec = dataclasses.replace(spec, pos_table=True)
    check_fit(tensors, spec, layout, where=str(checkpoint.path), origin=origin)
    return StoredModel(checkpoint, spec, layout, names)


def model_name(path: Path) -> str:
    """What to call the model of a checkpoint, also of one in a hub cache.

    ``models--stabilityai--stable-diffusion-3.5-medium/snapshots/<hash>/transformer`` → ``stable-diffusion-3.5-medium``,
    ``models/flux1-dev.safetensors`` → ``flux1-dev``
    """
    if path.suffix.lower() in SAFETENSORS_SUFFIXES:
        if not path.name.startswith(WEIGHTS_STEM):
            return path.stem or "mmdit"
        path = path.parent
    if path.name == "transformer":
        path = path.parent
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.absolute().name or "mmdit"
