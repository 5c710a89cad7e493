"""Where weights come from: a checkpoint, a seed, or a bundle's own file. All give canonical tensors by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmdit_deploy.checkpoint.convert import convert
from mmdit_deploy.checkpoint.folder import Checkpoint, open_checkpoint
from mmdit_deploy.checkpoint.keys import POSITION_TABLE, Parameter, Part, parameters
from mmdit_deploy.checkpoint.random_source import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.safetensors_file import SafetensorsFile
from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.weight_files import name_some
from mmdit_deploy.checkpoint.writer import Layout, plan_layout
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.model.embeddings import SincosPositions
from mmdit_deploy.model.mmdit import grid_ids
from mmdit_deploy.spec import ModelSpec, spec_from_config


class WeightSource(Protocol):
    """Gives canonical tensors, one at a time.

    Attributes:
        description: where the weights come from, in words; made-up weights are called random.
    """

    description: str

    def part(self, part: Part) -> Tensor:
        """One canonical tensor in the source's dtype, not to be written to."""
        ...


class RandomWeights:
    """Made-up weights from a seed: the same to the bit on any machine, in any order of keys.

    Gates and modulations are not zero: with AdaLN-Zero's initial values every block would be the identity, and a
    comparison would prove nothing.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.description = f"random (seed {seed})"

    def part(self, part: Part) -> Tensor:
        mean, std = weight_statistics(part.key, part.shape)
        return random_tensor(self.seed, part.key, part.shape, std=std, mean=mean)


class FileWeights:
    """Canonical tensors of one open file or folder."""

    def __init__(self, source: Checkpoint | SafetensorsFile, description: str):
        self._source = source
        self.description = description

    def part(self, part: Part) -> Tensor:
        return self._source.read(part.key)


def read_parameter(source: WeightSource, parameter: Parameter, dtype: torch.dtype) -> Tensor:
    """A parameter of the model, its parts joined, in its model shape.

    Raises:
        CheckpointError: NaN, Inf, or a value that the dtype cannot hold; it names the key.
    """
    parts = [convert(source.part(p), dtype, p.key) for p in parameter.parts]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.reshape(parameter.shape)


def weights_layout(spec: ModelSpec, dtype: torch.dtype, metadata: dict[str, str] | None = None) -> Layout:
    """Where every canonical tensor lies in the weights file of a bundle."""
    return plan_layout([(p.key, dtype, p.shape) for q in parameters(spec) for p in q.parts], metadata)


def stream_parts(spec: ModelSpec, source: WeightSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every canonical tensor in the layout's order, converted one at a time."""
    for parameter in parameters(spec):
        for part in parameter.parts:
            yield part.key, convert(source.part(part), dtype, part.key)


def open_weights(path: str | Path) -> tuple[ModelSpec, FileWeights]:
    """The spec and the weights of a checkpoint.

    Raises:
        CheckpointError: the files are broken, or the tensors do not fit the config; missing, extra and mis-shaped
            keys are listed by name.
    """
    checkpoint = open_checkpoint(path)
    spec = spec_from_config(checkpoint.config, model_name(checkpoint.path))
    if POSITION_TABLE in checkpoint.tensors and _table_differs(checkpoint, spec):
        spec = dataclasses.replace(spec, pos_table=True)
    _check_fit(checkpoint.tensors, spec, where=str(checkpoint.path))
    return spec, FileWeights(checkpoint, f"checkpoint {checkpoint.path}")


def model_name(folder: Path) -> str:
    """What to call the model of a checkpoint folder, also of one in a hub cache.

    ``models--stabilityai--stable-diffusion-3.5-medium/snapshots/<hash>/transformer`` → ``stable-diffusion-3.5-medium``
    """
    if folder.name == "transformer":
        folder = folder.parent
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.absolute().name or "mmdit"


def _check_fit(tensors: dict[str, TensorInfo], spec: ModelSpec, *, where: str) -> None:
    expected = {part.key: part.shape for parameter in parameters(spec) for part in parameter.parts}
    missing = set(expected) - set(tensors)
    extra = set(tensors) - set(expected) - {POSITION_TABLE}
    misshaped = [
        f"{key} {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems = [
        f"{len(keys)} {what}: {name_some(keys)}"
        for what, keys in (("missing", missing), ("not of this model", extra), ("mis-shaped", misshaped))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"the tensors of {where} must be those that its config.json implies",
            received="; ".join(problems),
            fix="check that config.json belongs to these files, and download the folder again",
        )


def _table_differs(checkpoint: Checkpoint, spec: ModelSpec) -> bool:
    """Whether a checkpoint's position table is another than the formula's, beyond the rounding of its dtype.

    Read by bands of rows: SD3.5-Large's table has 90 million values.
    """
    info = checkpoint.tensors[POSITION_TABLE]
    if info.shape != (1, spec.max_img_tokens, spec.width):
        raise CheckpointError(
            f"{POSITION_TABLE} has one row per position of the {spec.pos_max_size}² grid",
            received=f"shape {list(info.shape)}, expected {[1, spec.max_img_tokens, spec.width]}",
            fix="check that config.json belongs to these files",
        )
    table = checkpoint.read(POSITION_TABLE)[0]
    # Sines and cosines are at most 1, so rounding is at most the dtype's epsilon; 2e-5 is the fp32 angles' own error.
    tolerance = torch.finfo(info.dtype).eps + 2e-5
    formula = SincosPositions(spec)
    rows = torch.arange(spec.pos_max_size)
    for band in rows.split(max(1, 4096 // spec.pos_max_size)):
        ids = grid_ids(len(band), spec.pos_max_size) + torch.tensor([float(band[0]), 0.0])
        start = int(band[0]) * spec.pos_max_size
        stored = table[start : start + len(ids)].float()
        if not bool(((stored - formula.at(ids)).abs() <= tolerance).all()):
            return True
    return False
