"""What a LoRA adds to one canonical tensor. The factors stay mapped until they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import SafetensorsFile, convert


@dataclass(frozen=True)
class Rows:
    """The rows of a module that are one canonical tensor's.

    Args:
        start, count: in canonical order.
        swapped: the module's two halves are in the other order.
    """

    start: int
    count: int
    swapped: bool

    def of(self, tensor: Tensor) -> Tensor:
        """A view of them; a copy where the halves are swapped."""
        if self.swapped:
            tensor = tensor.roll(len(tensor) // 2, 0)
        return tensor[self.start : self.start + self.count]


class Delta(Protocol):
    """A change of a tensor."""

    def add(self, matrix: Tensor, scale: float) -> None:
        """Add it, ``scale`` times, to a weight [out, in], or a bias [out, 1], in fp32 and in place.

        Raises:
            CheckpointError: NaN or Inf in the LoRA; it names the key.
        """
        ...


@dataclass(frozen=True)
class LowRank:
    """``factor`` · B·A, some rows of it."""

    file: SafetensorsFile
    down: str
    up: str
    factor: float
    rows: Rows

    def add(self, matrix: Tensor, scale: float) -> None:
        down = convert(self.file.read(self.down), torch.float32, self.down)
        up = convert(self.rows.of(self.file.read(self.up)), torch.float32, self.up)
        # The product is added as it is made, so that it takes no memory of its own.
        matrix.addmm_(up.flatten(1), down.flatten(1), alpha=scale * self.factor)


@dataclass(frozen=True)
class Whole:
    """``factor`` times a tensor, some rows of it."""

    file: SafetensorsFile
    key: str
    factor: float
    rows: Rows

    def add(self, matrix: Tensor, scale: float) -> None:
        tensor = convert(self.rows.of(self.file.read(self.key)), torch.float32, self.key)
        matrix.add_(tensor.reshape(matrix.shape), alpha=scale * self.factor)
