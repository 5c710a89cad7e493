"""The inputs that verification runs: shapes, timesteps and tensors, fixed by the contract and a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.contract import Contract
from mmdit_deploy.model import grid_ids
from mmdit_deploy.verify.records import Case

# (batch, rows, cols, text tokens): square, wide and tall grids, small enough for a 2 B model on two cores.
QUICK_SHAPES = ((1, 16, 16, 77), (2, 16, 17, 32), (1, 20, 15, 120))
THOROUGH_SHAPES = (*QUICK_SHAPES, (1, 32, 32, 333), (2, 24, 40, 154), (1, 64, 64, 77))
# Both ends of the schedule, where few and where many wavelengths of the embedding matter, and a fractional middle.
TIMESTEPS = (999.0, 500.25, 3.0)
INPUT_SEED = 20_240_305  # of the inputs alone; weights have their own


def default_cases(contract: Contract, *, thorough: bool = False) -> tuple[Case, ...]:
    """Every shape at every timestep, each size moved into the contract's range."""
    shapes = []
    for batch, rows, cols, txt_tokens in THOROUGH_SHAPES if thorough else QUICK_SHAPES:
        ranges = contract.ranges
        fitted = (
            ranges["batch"].clamp(batch),
            *fit_grid(rows, cols, ranges["img_tokens"].min, ranges["img_tokens"].max),
            ranges["txt_tokens"].clamp(txt_tokens),
        )
        if fitted not in shapes:
            shapes.append(fitted)
    return tuple(Case(*shape, timestep=t) for shape in shapes for t in TIMESTEPS)


def case_inputs(case: Case, contract: Contract) -> dict[str, Tensor]:
    """The contract's inputs for a case: standard-normal-like features, the same on any machine.

    Rounded to the I/O type, so that engine and reference get equal inputs. Timesteps differ over the batch.
    """
    sizes = {"batch": case.batch, "img_tokens": case.img_tokens, "txt_tokens": case.txt_tokens}
    inputs = {}
    for tensor in contract.inputs:
        dtype = getattr(torch, tensor.dtype)
        if tensor.name == "img_ids":
            inputs[tensor.name] = grid_ids(case.rows, case.cols)
        elif tensor.name == "timestep":
            inputs[tensor.name] = (case.timestep - torch.arange(case.batch)).clamp(min=0.0).to(dtype)
        else:
            shape = tensor.shape(sizes)
            # Keyed by shape, not by timestep: one latent is looked at over the whole schedule.
            key = f"{tensor.name} {list(shape)} {case.rows}x{case.cols}"
            inputs[tensor.name] = random_tensor(INPUT_SEED, key, shape, std=1.0).to(dtype)
    return inputs


def fit_grid(rows: int, cols: int, least: int, most: int) -> tuple[int, int]:
    """The grid nearest to rows × cols, of the same aspect, whose tokens lie in the range."""
    if least <= rows * cols <= most:
        return rows, cols
    tokens = min(max(rows * cols, least), most)
    height = max(1, round((tokens * rows / cols) ** 0.5))
    for candidate in sorted(range(1, tokens + 1), key=lambda r: abs(r - height)):
        width = most // candidate if candidate * (tokens // candidate) < least else tokens // candidate
        if width >= 1 and least <= candidate * width <= most:
            return candidate, width
    return 1, tokens
