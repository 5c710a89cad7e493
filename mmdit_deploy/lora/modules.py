"""One module of a LoRA: its tensors are checked against the model, and become deltas of canonical tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.convert import FLOAT_DTYPES
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.lora.alpha import AdapterConfig, alpha_of
from mmdit_deploy.lora.delta import Delta, LowRank, Rows, Whole
from mmdit_deploy.lora.keys import Role
from mmdit_deploy.lora.targets import Target

_FIX = "check that the LoRA was trained on this model, and get its file again"


@dataclass(frozen=True)
class Module:
    """What a LoRA does to one module.

    Args:
        rank: of its factors; None where it has none, but differences.
        alpha: with which they are scaled; None where the file says nothing, and it is taken to be the rank.
        deltas: by canonical key.
    """

    rank: int | None
    alpha: float | None
    deltas: tuple[tuple[str, Delta], ...]


def read_module(
    name: str, keys: Mapping[Role, str], target: Target, file: SafetensorsFile, config: AdapterConfig | None
) -> Module:
    """Check the tensors of a module.

    Args:
        name: the module's, without prefix.
        keys: of its tensors in the file.
        target: what it stands for in the model.
        config: which says alpha where no tensor does.

    Raises:
        CheckpointError: tensors are missing, do not fit the model, or are of an unknown dtype.
    """
    pair = [role for role in (Role.DOWN, Role.UP) if role in keys]
    alone = Role.ALPHA in keys or Role.UP_BIAS in keys
    if len(pair) == 1 or (alone and not pair):
        raise CheckpointError(
            f"a module of {file.path} has both factors, A and B (lora_A and lora_B, or lora_down and lora_up)",
            received=f"{quote(name)} with " + ", ".join(quote(key) for key in keys.values()),
            fix="get the file again; it is not whole",
        )
    deltas: list[tuple[str, Delta]] = []
    rank = alpha = None
    if pair:
        rank, alpha, factor = _scaling(name, keys, file, config)
        weight = target.weights[0]
        rows, columns = sum(part.shape[0] for part in target.weights), math.prod(weight.shape[1:])
        if len(weight.shape) < 2:
            raise CheckpointError(
                f"{quote(name)} is a vector, which has no factors", received=quote(keys[Role.DOWN]), fix=_FIX
            )
        # Factors of convolutions have the kernel's dims as well: [rank, in, 2, 2] and [out, rank, 1, 1].
        _check(file, keys[Role.DOWN], (rank, columns))
        _check(file, keys[Role.UP], (rows, rank))
        for part, span in _spans(target.weights, target.swapped):
            deltas.append((part.key, LowRank(file, keys[Role.DOWN], keys[Role.UP], factor, span)))
        if Role.UP_BIAS in keys:
            deltas += _whole(file, keys[Role.UP_BIAS], target.biases, target.swapped, factor, name)
    if Role.WEIGHT_DIFF in keys:
        deltas += _whole(file, keys[Role.WEIGHT_DIFF], target.weights, target.swapped, 1.0, name)
    if Role.BIAS_DIFF in keys:
        deltas += _whole(file, keys[Role.BIAS_DIFF], target.biases, target.swapped, 1.0, name)
    return Module(rank, alpha, tuple(deltas))


def _scaling(
    name: str, keys: Mapping[Role, str], file: SafetensorsFile, config: AdapterConfig | None
) -> tuple[int, float | None, float]:
    """Rank, alpha where it is known, and the factor of B·A."""
    shape = file.tensors[keys[Role.DOWN]].shape
    rank = shape[0] if shape else 0
    if rank < 1:
        raise CheckpointError(
            f"{quote(keys[Role.DOWN])} of {file.path} is [rank, in], of rank 1 or more",
            received=f"shape {list(shape)}",
            fix=_FIX,
        )
    if Role.ALPHA in keys:
        key = keys[Role.ALPHA]
        info = file.tensors[key]
        single = math.prod(info.shape) == 1 and not info.dtype.is_complex
        value = file.read(key).double().item() if single else f"{info.dtype} {list(info.shape)}"
        alpha = alpha_of(value, f"{quote(key)} of {file.path}")
        return rank, alpha, alpha / rank
    if config is not None:
        return rank, *config.of(name, rank)
    return rank, None, 1.0


def _whole(
    file: SafetensorsFile, key: str, parts: tuple[Part, ...], swapped: bool, factor: float, name: str
) -> Iterator[tuple[str, Delta]]:
    """The deltas of a tensor that is like the module's own."""
    if not parts:
        raise CheckpointError(f"{quote(name)} has no bias in this model", received=quote(key), fix=_FIX)
    _check(file, key, (sum(part.shape[0] for part in parts), math.prod(parts[0].shape[1:])))
    for part, span in _spans(parts, swapped):
        yield part.key, Whole(file, key, factor, span)


def _spans(parts: tuple[Part, ...], swapped: bool) -> Iterator[tuple[Part, Rows]]:
    start = 0
    for part in parts:
        yield part, Rows(start, part.shape[0], swapped)
        start += part.shape[0]


def _check(file: SafetensorsFile, key: str, expected: tuple[int, int]) -> None:
    """A tensor is a float matrix of a shape, whose columns may be several dims."""
    info = file.tensors[key]
    if info.shape[:1] != expected[:1] or math.prod(info.shape[1:]) != expected[1]:
        raise CheckpointError(
            f"{quote(key)} of {file.path} must fit its module and its other factor",
            received=f"shape {list(info.shape)}, expected {list(expected)}",
            fix=_FIX,
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{quote(key)} of {file.path} must be stored in fp32, fp16 or bf16",
            received=str(info.dtype),
            fix="save the LoRA in one of these dtypes",
        )
