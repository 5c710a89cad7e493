"""The modules that a LoRA may name, in diffusers' words and in those of the original layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmdit_deploy.checkpoint.keys import Part, parameters
from mmdit_deploy.lora.keys import PREFIXES
from mmdit_deploy.spec import ModelSpec


@dataclass(frozen=True)
class Target:
    """What a module's name stands for: canonical tensors, whose rows are the module's, one after the other.

    Args:
        weights: of the module; several where the original layout joins what diffusers keeps apart (Q, K and V).
        biases: likewise; none where the module has no bias.
        swapped: the module's two halves of rows are in the other order than the canonical tensor's.
    """

    weights: tuple[Part, ...]
    biases: tuple[Part, ...]
    swapped: bool = False


# XLabs' trainer for FLUX.1 names the attention's processors (github.com/XLabs-AI/x-flux, src/flux/modules/layers.py):
# what ends like the first is also called like the second, and is the first so many of its tensors.
_PROCESSORS = (
    (r"(double_blocks\.\d+)\.img_attn\.qkv", r"\1.processor.qkv_lora1", 3),
    (r"(double_blocks\.\d+)\.txt_attn\.qkv", r"\1.processor.qkv_lora2", 3),
    (r"(double_blocks\.\d+)\.img_attn\.proj", r"\1.processor.proj_lora1", 1),
    (r"(double_blocks\.\d+)\.txt_attn\.proj", r"\1.processor.proj_lora2", 1),
    (r"(single_blocks\.\d+)\.linear1", r"\1.processor.qkv_lora", 3),
    (r"(single_blocks\.\d+)\.linear2", r"\1.processor.proj_lora", 1),
)


def targets(spec: ModelSpec) -> dict[str, Target]:
    """Every module with weights, by each name that it has; dots are underscores where kohya's scripts wrote it.

    The underscored names are derived from the dotted ones, because the way back is ambiguous: ``img_attn_qkv``.
    """
    tensors: dict[tuple[str, bool], dict[str, tuple[Part, ...]]] = {}
    for parameter in parameters(spec):
        leaf = parameter.path.rpartition(".")[2]
        if leaf not in ("weight", "bias"):
            continue  # the table of positions
        for part in parameter.parts:
            tensors.setdefault((part.key.removesuffix(f".{leaf}"), False), {})[leaf] = (part,)
        if parameter.original is not None:
            name = parameter.original.rpartition(".")[0]
            tensors.setdefault((name, parameter.swapped), {})[leaf] = parameter.parts
    table = {n: Target(t["weight"], t.get("bias", ()), swapped) for (n, swapped), t in tensors.items()}
    for name, target in list(table.items()):
        if name.endswith(".to_out.0"):
            table.setdefault(name.removesuffix(".0"), target)  # some leave the Sequential out
        for pattern, alias, count in _PROCESSORS:
            if (match := re.fullmatch(pattern, name)) and len(target.weights) >= count:
                table[match.expand(alias)] = Target(target.weights[:count], target.biases[:count], target.swapped)
    return {name.replace(".", "_"): target for name, target in table.items()} | table


def resolve(name: str, table: Mapping[str, Target]) -> tuple[str, Target] | None:
    """Look a module up under what a file calls it.

    Args:
        name: with or without one of the usual prefixes.
        table: from `targets`.

    Returns:
        The name without its prefix, and what it stands for; None where the model has no such module.
    """
    for prefix in ("", *PREFIXES):
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and bare in table:
            return bare, table[bare]
    return None
