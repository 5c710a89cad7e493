"""The inputs that verification runs: shapes, timesteps and tensors, fixed by the contract and a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.contract import AXES, Contract, Profile, Range
from mmdit_deploy.eager.inputs import model_inputs, with_reference
from mmdit_deploy.errors import UsageError
from mmdit_deploy.runtime.tensorrt import choose_profile
from mmdit_deploy.spec import ModelSpec, Precision
from mmdit_deploy.verify.records import Case

Shape = tuple[int, int, int, int]  # batch, rows, cols, text tokens

# Square, wide and tall grids, small enough for a 2 B model on two cores.
QUICK_SHAPES: tuple[Shape, ...] = ((1, 16, 16, 77), (2, 16, 17, 32), (1, 20, 15, 120))
THOROUGH_SHAPES: tuple[Shape, ...] = (*QUICK_SHAPES, (1, 32, 32, 333), (2, 24, 40, 154), (1, 64, 64, 77))
SMALL_SHAPE: Shape = (1, 16, 17, 32)  # for a profile that is given none of these
MIDDLE = 500.25
# Both ends of the schedule, where few and where many wavelengths of the embedding matter, and a fractional middle.
TIMESTEPS = (999.0, MIDDLE, 3.0)
# How far a quantized model is off changes over the schedule: what its activations are is what its scales were made for.
QUANTIZED_TIMESTEPS = (999.0, 900.0, 750.5, 625.0, MIDDLE, 333.0, 100.5, 3.0)
INPUT_SEED = 20_240_305  # of the inputs alone; weights have their own


def default_cases(
    contract: Contract, precision: Precision | None = None, *, thorough: bool = False
) -> tuple[Case, ...]:
    """Every shape at every timestep, each moved into the profile that is nearest to it.

    A profile that has none by then gets one case of its own: each is another plan of a TensorRT engine, with kernels of
    its own.

    Args:
        precision: of a quantized one, each shape is run at eight timesteps in place of three.
        thorough: more and larger shapes.

    Raises:
        UsageError: no image that the model has positions for has as many tokens as a profile says.
    """
    wanted = THOROUGH_SHAPES if thorough else QUICK_SHAPES
    shapes = tuple(dict.fromkeys(_nearest(shape, contract) for shape in wanted))
    run = {_chosen(shape, contract.profiles) for shape in shapes}
    own = [_own_shape(index, contract) for index in range(len(contract.profiles)) if index not in run]
    timesteps = QUANTIZED_TIMESTEPS if precision is not None and precision.quantized else TIMESTEPS
    return (
        *(Case(*shape, timestep=t) for shape in shapes for t in timesteps),
        *(Case(*shape, timestep=MIDDLE) for shape in dict.fromkeys(own) if shape not in shapes),
    )


def case_inputs(case: Case, contract: Contract, spec: ModelSpec, *, seed: int = INPUT_SEED) -> dict[str, Tensor]:
    """The contract's inputs for a case: standard-normal-like features, the same on any machine.

    Rounded to the I/O type, so that engine and reference get equal inputs. Timesteps and guidance differ over the
    batch, a mask has holes, and of a model that takes reference images the lower half is one.
    """

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        # Keyed by shape, not by timestep: one latent is looked at over the whole schedule.
        return random_tensor(seed, f"{name} {list(shape)} {case.rows}x{case.cols}", shape, std=1.0)

    images = with_reference(spec, case.rows, case.cols)
    timestep = (case.timestep - torch.arange(case.batch)).clamp(min=0.0)
    return model_inputs(contract, spec, case.batch, images, case.txt_tokens, timestep, draw)


def fit_grid(rows: int, cols: int, least: int, most: int, max_side: int | None = None) -> tuple[int, int]:
    """The grid whose tokens lie in the range and whose sides are nearest to those of rows × cols, scaled into it.

    What is not square stays so wherever it can: only such a grid tells rows from columns.

    Args:
        least, most: of its tokens.
        max_side: of its rows and of its columns; None for any.

    Raises:
        UsageError: there is no such grid.
    """
    side = most if max_side is None else min(max_side, most)
    if least <= rows * cols <= most and max(rows, cols) <= side:
        return rows, cols
    tokens = min(max(rows * cols, least), most)
    # The two sides that have just these tokens and this aspect, were sides not whole.
    height, width = (tokens * rows / cols) ** 0.5, (tokens * cols / rows) ** 0.5
    grids = list(_grids(int(width), least, most, side))
    if not grids:
        raise _no_grid(least, most, side)

    def distance(grid: tuple[int, int]) -> tuple[bool, float]:
        square = grid[0] == grid[1] and rows != cols
        return square, round(math.log(grid[0] / height) ** 2 + math.log(grid[1] / width) ** 2, 9)

    return min(grids, key=distance)


def _grids(width: int, least: int, most: int, side: int) -> Iterator[tuple[int, int]]:
    """For each number of rows, the grids of about this width whose tokens lie in the range."""
    for rows in range(1, side + 1):
        low, high = -(-least // rows), min(most // rows, side)
        if low <= high:
            for cols in sorted({min(max(near, low), high) for near in range(width - 1, width + 3)}):
                yield rows, cols


def _no_grid(least: int, most: int, side: int) -> UsageError:
    fewer = max(rows * min(side, least // rows) for rows in range(1, side + 1))
    return UsageError(
        f"an image is a grid of at most {side} × {side} tokens, where the model has positions",
        received=f"{least} image tokens" if least == most else f"{least} to {most} image tokens: there is no such grid",
        fix=f"a number or a range with such a grid in it, e.g. {fewer}",
    )


def _moved(shape: Shape, profile: Profile, max_side: int | None) -> Shape:
    """The shape, each size moved into the profile's range."""
    batch, rows, cols, txt_tokens = shape
    tokens = profile["img_tokens"]
    rows, cols = fit_grid(rows, cols, tokens.min, tokens.max, max_side)
    return profile["batch"].clamp(batch), rows, cols, profile["txt_tokens"].clamp(txt_tokens)


def _nearest(shape: Shape, contract: Contract) -> Shape:
    """The shape, moved into the profile in which it changes least."""
    moved = [_moved(shape, profile, contract.max_side) for profile in contract.profiles]
    return min(moved, key=lambda m: sum(abs(math.log(b / a)) for a, b in zip(_sizes(shape), _sizes(m), strict=True)))


def _sizes(shape: Shape) -> tuple[int, int, int]:
    """The sizes of `AXES`."""
    batch, rows, cols, txt_tokens = shape
    return batch, rows * cols, txt_tokens


def _chosen(shape: Shape, profiles: Sequence[Profile]) -> int:
    """The profile that an engine runs a shape in, which lies in one of them."""
    return choose_profile(profiles, dict(zip(AXES, _sizes(shape), strict=True)))


def _own_shape(index: int, contract: Contract) -> Shape:
    """A small shape that an engine runs in this profile; one that lies in it where another always comes first.

    What the profiles before it leave of a profile has its least corners where it begins, or just past one of them.
    """
    profile, earlier = contract.profiles[index], contract.profiles[:index]
    floors = [
        sorted({profile[a].min, *(p[a].max + 1 for p in earlier if profile[a].min <= p[a].max < profile[a].max)})
        for a in AXES
    ]
    shapes = []
    for corner in sorted(product(*floors), key=lambda sizes: sizes[0] * (sizes[1] + sizes[2])):
        rest = {a: Range(least, profile[a].max, profile[a].max) for a, least in zip(AXES, corner, strict=True)}
        try:
            shapes.append(_moved(SMALL_SHAPE, rest, contract.max_side))
        except UsageError:  # no grid is left there; in the profile there is one
            continue
        if _chosen(shapes[-1], contract.profiles) == index:
            return shapes[-1]
    return shapes[0]
