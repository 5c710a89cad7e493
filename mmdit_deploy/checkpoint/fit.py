"""Whether the tensors of a checkpoint are exactly those of an architecture, and its positions the formula's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from mmdit_deploy.checkpoint.convert import FLOAT_DTYPES
from mmdit_deploy.checkpoint.key_tables import KeyLayout
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.original_layout import stored_parts
from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.weight_files import name_some
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import family_of
from mmdit_deploy.families.family import grid
from mmdit_deploy.model.embeddings import SincosPositions
from mmdit_deploy.spec import ModelSpec

Origin = Literal["config.json", "config.json beside", "tensors"]  # what an architecture was read from
_MISFIT = {  # rule and fix
    "config.json": (
        "the tensors of {} must be those that its config.json implies",
        "check that config.json belongs to these files, and download the folder again",
    ),
    "config.json beside": (
        "the tensors of {} must be those that the config.json beside it implies",
        "pass the folder that both are in",
    ),
    "tensors": (
        "{} must hold all tensors of the architecture that some of them imply, and no others",
        "get the file again; if it is one of several, pass the folder that holds them and config.json",
    ),
}


def check_fit(
    tensors: Mapping[str, TensorInfo], spec: ModelSpec, layout: KeyLayout, *, where: str, origin: Origin
) -> None:
    """Checks that tensors are those of an architecture: none missing, none else, each of its shape, and floats.

    Args:
        tensors: the transformer's, by their keys in the layout.
        spec: the architecture.
        layout: of the keys.
        where: how to name the checkpoint in messages.
        origin: what the architecture was read from.

    Raises:
        CheckpointError: they are not; missing, extra and mis-shaped keys, and other dtypes, are listed by name.
    """
    expected = {part.key: part.shape for p in parameters(spec) for part in stored_parts(p, layout)}
    buffers = family_of(spec).buffers
    missing = set(expected) - set(tensors)
    extra = set(tensors) - set(expected) - set(buffers if layout == "diffusers" else buffers.values())
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
        rule, fix = _MISFIT[origin]
        raise CheckpointError(rule.format(where), received="; ".join(problems), fix=fix)
    others = [
        f"{key} {str(info.dtype).removeprefix('torch.')}"
        for key, info in tensors.items()
        if info.dtype not in FLOAT_DTYPES
    ]
    if others:
        raise CheckpointError(
            f"the tensors of {where} must be stored in fp32, fp16 or bf16",
            received=f"{len(others)} of {len(tensors)} in another dtype: {name_some(others)}",
            fix="pass the checkpoint that it was made from: precision is chosen at export",
        )


def table_differs(table: torch.Tensor, spec: ModelSpec, key: str) -> bool:
    """Whether a checkpoint's position table is another than the formula's, beyond the rounding of its dtype.

    Read by bands of rows: SD3.5-Large's table has 90 million values.

    Args:
        table: as stored, [1, positions, width].
        spec: the architecture.
        key: of the table, for messages.

    Raises:
        CheckpointError: it has another shape.
    """
    expected = (1, spec.pos_max_size**2, spec.width)
    if tuple(table.shape) != expected or not table.is_floating_point():
        raise CheckpointError(
            f"{key} has one row per position of the {spec.pos_max_size}² grid",
            received=f"shape {list(table.shape)} of {table.dtype}, expected {list(expected)} of floats",
            fix="check that config.json belongs to these files",
        )
    # Sines and cosines are at most 1, so rounding is at most the dtype's epsilon; 2e-5 is the fp32 angles' own error.
    tolerance = torch.finfo(table.dtype).eps + 2e-5
    formula = SincosPositions(spec)
    rows = torch.arange(spec.pos_max_size)
    for band in rows.split(max(1, 4096 // spec.pos_max_size)):
        ids = torch.from_numpy(grid(len(band), spec.pos_max_size)) + torch.tensor([float(band[0]), 0.0])
        start = int(band[0]) * spec.pos_max_size
        stored = table[0, start : start + len(ids)].float()
        if not bool(((stored - formula.at(ids)).abs() <= tolerance).all()):
            return True
    return False
