"""How the model's parameters are stored: canonical keys are diffusers' names and layouts.

A parameter that joins several canonical tensors (Q, K and V) is their concatenation along the first axis. The
weights file keeps those next to each other, so that the joined parameter is one span and costs no copy.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from mmdit_deploy.families import POSITION_TABLE, Family, family_of
from mmdit_deploy.model import MMDiT
from mmdit_deploy.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """One canonical tensor: its key and its shape in the checkpoint."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, and the canonical tensors that it is made of.

    Args:
        path: its name in `MMDiT`, e.g. ``blocks.0.img.qkv.proj.weight``.
        shape: its shape in the model: the parts, reshaped to 2-D where it is 2-D, joined along the first axis.
        parts: the canonical tensors, in order.
        original: its key in the authors' own layout, where it is one tensor; None where that layout is diffusers'.
        swapped: the original's two halves are in the other order.
    """

    path: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    original: str | None = None
    swapped: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@functools.lru_cache(maxsize=8)  # a whole model of modules is made to count them
def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of the weights file.

    All modulation weights come one after the other, then all their biases, so that one matrix product can make the
    modulations of all blocks and of the head, and a file without them is a contiguous cut.
    """
    with torch.device("meta"):
        model = MMDiT(spec)
    family = family_of(spec)
    table = [_parameter(path, tuple(p.shape), spec, family) for path, p in model.named_parameters()]
    return tuple(sorted(table, key=_file_order))


_STAGES = (
    ("conditioning",),
    ("modulations", "single_modulations", "shared_modulation", "final_modulation"),
    ("img_embed",),
    ("txt_embed",),
    ("blocks",),
    ("single_blocks",),
    ("final",),
)


def _file_order(parameter: Parameter) -> tuple[int, bool]:
    head = parameter.path.split(".")[0]
    stage = next(i for i, heads in enumerate(_STAGES) if head in heads)
    return stage, stage == 1 and parameter.path.endswith(".bias")


def _parameter(path: str, shape: tuple[int, ...], spec: ModelSpec, family: Family) -> Parameter:
    if path == "img_embed.positions.table":
        return Parameter(path, shape, (Part(POSITION_TABLE, (1, *shape)),), original=family.buffers[POSITION_TABLE])
    module, _, leaf = path.rpartition(".")
    steps = module.split(".")
    index = next((s for s in steps if s.isdecimal()), "")
    pattern = ".".join("*" if s.isdecimal() else s for s in steps)
    keys = next(k for k in family.keys if k.path == pattern)
    shapes: list[tuple[int, ...]]
    if path == "img_embed.proj.weight" and family.patch_convolution:
        shapes = [(spec.width, spec.latent_channels, spec.patch_size, spec.patch_size)]  # like our tokens
    else:
        shapes = [(rows, *shape[1:]) for rows in keys.rows(shape[0], spec.width)]
    parts = tuple(
        Part(f"{name.replace('*', index)}.{leaf}", part) for name, part in zip(keys.diffusers, shapes, strict=True)
    )
    last = spec.text_ends and index == str(spec.depth - 1)
    return Parameter(
        path,
        shape,
        parts,
        original=keys.original and f"{keys.original.replace('*', index)}.{'scale' if keys.scale else leaf}",
        swapped=keys.swapped == "always" or (keys.swapped == "last block" and last),
    )
