"""Where weights come from: a checkpoint, a seed, or a bundle's own file. All give canonical tensors by key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmdit_deploy.checkpoint.convert import convert
from mmdit_deploy.checkpoint.keys import Parameter, Part, parameters
from mmdit_deploy.checkpoint.random_source import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.safetensors_file import SafetensorsFile
from mmdit_deploy.checkpoint.stored_model import StoredModel, open_model
from mmdit_deploy.checkpoint.writer import Layout, plan_layout
from mmdit_deploy.spec import ModelSpec


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
    """Canonical tensors of one open file that holds them under their own keys, such as a bundle's."""

    def __init__(self, source: SafetensorsFile, description: str):
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


def open_weights(path: str | Path, preset: ModelSpec | None = None) -> tuple[ModelSpec, StoredModel]:
    """The spec and the weights of a checkpoint: a diffusers folder, or one safetensors file in any known layout.

    Args:
        path: the folder or file.
        preset: what the model is meant to be: says what a file's tensors do not tell. See `check_same` for the rest.

    Raises:
        CheckpointError: the files are broken, or the tensors do not fit the config, or no one family; missing, extra
            and mis-shaped keys are listed by name.
    """
    model = open_model(path, preset)
    return model.spec, model
