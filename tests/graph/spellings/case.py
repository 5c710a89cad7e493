"""One computation that exporters spell in many ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A module, what to export it with, and what fusing must make of it.

    Args:
        name: of the fixture's file.
        module: tiny, with weights made from integers or a seed: the fixture holds them.
        inputs: by argument name of ``forward``; sizes of 2 or more, and unlike.
        axes: the dynamic ones, by input: ``{"x": {0: "batch", 1: "tokens"}}``.
        expect: nodes by op that the fused graph has; a near miss says 0.
        exporters: which can export it.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    expect: Mapping[str, int]
    exporters: tuple[str, ...] = field(default=("dynamo", "torchscript"))
