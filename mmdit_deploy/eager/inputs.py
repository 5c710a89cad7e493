"""The model's inputs, as the contract says: positions, a timestep, guidance, and features that somebody draws."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import Values
from mmdit_deploy.families import Grid, family_of, position_ids
from mmdit_deploy.spec import ModelSpec

GUIDANCE = 3.5  # of the first image, as FLUX.1-dev is used
_DRAWS = 12  # uniform ones whose sum is called normal: its tails end at six standard deviations

# What a tensor of features holds: by its name and shape, fp32 of mean 0 and standard deviation 1.
Draw = Callable[[str, tuple[int, ...]], Tensor]


def model_inputs(
    contract: Contract,
    spec: ModelSpec,
    batch: int,
    images: Sequence[Grid],
    txt_tokens: int,
    timestep: Tensor,
    draw: Draw,
) -> Values:
    """The contract's inputs for images of a batch.

    Features are rounded to the contract's type. Guidance differs over the batch, and a mask has holes.

    Args:
        images: rows and columns of the image that is made, then of its reference images, in tokens.
        timestep: [batch], from 0 to 1000 whatever the model's own scale is.
        draw: makes what is neither a position, nor a timestep, nor guidance.
    """
    sizes = {"batch": batch, "img_tokens": sum(map(math.prod, images)), "txt_tokens": txt_tokens}
    img_ids, txt_ids = position_ids(spec, images, txt_tokens)
    known = {
        "img_ids": torch.from_numpy(img_ids),
        "txt_ids": torch.from_numpy(txt_ids),
        "timestep": timestep / spec.time_scale,
        "guidance": GUIDANCE + torch.arange(batch),
    }
    inputs = {}
    for tensor in contract.inputs:
        dtype = getattr(torch, tensor.dtype)
        if tensor.name in known:
            inputs[tensor.name] = known[tensor.name].to(dtype)
        else:
            values = draw(tensor.name, tensor.shape(sizes))
            inputs[tensor.name] = values > -1 if dtype == torch.bool else values.to(dtype)
    return inputs


def with_reference(spec: ModelSpec, rows: int, cols: int) -> list[Grid]:
    """A grid of tokens as images: of a model that takes reference images, the lower half is one."""
    lower = rows // 2 if family_of(spec).references else 0
    return [(rows - lower, cols), *([(lower, cols)] if lower else [])]


def noise(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, fp32: a sum of uniform draws, which is the same to the bit on any machine."""
    std = 1 / math.sqrt(_DRAWS)
    return functools.reduce(operator.add, (random_tensor(seed, f"{key} {i}", shape, std=std) for i in range(_DRAWS)))
