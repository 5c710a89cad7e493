"""The model's linear layers, and the role that each one plays: what recipes speak of."""

from __future__ import annotations

import re
from typing import Literal

from mmdit_deploy.checkpoint.keys import Parameter, parameters
from mmdit_deploy.spec import ModelSpec

Role = Literal["attention", "mlp", "modulation", "embedders", "final"]

# By path in `MMDiT`. A single block's two products hold the attention's projections and the MLP in one: they count as
# MLP, which is the larger part.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"blocks\.\d+\.(?:img|txt)\.(?:qkv2?\.proj|attn2?_out)")),
    ("mlp", re.compile(r"blocks\.\d+\.(?:img|txt)\.mlp\.(?:up|down)|single_blocks\.\d+\.(?:proj|out)")),
    (
        "modulation",
        re.compile(r"(?:(?:single_)?modulations\.\d+|shared_modulation)(?:\.\w+)?\.proj|final_modulation\.proj"),
    ),
    ("embedders", re.compile(r"(?:img_embed|txt_embed)\.proj|conditioning\..*\.(?:up|down)")),
    ("final", re.compile(r"final\.proj")),
)
ROLES: tuple[Role, ...] = tuple(role for role, _ in _ROLES)


def role_of(linear: str) -> Role:
    """The role of a linear layer.

    Args:
        linear: its path in `MMDiT`, e.g. ``blocks.3.img.mlp.up``.

    Raises:
        ValueError: that is none.
    """
    for role, pattern in _ROLES:
        if pattern.fullmatch(linear):
            return role
    raise ValueError(f"{linear} is no linear layer of an MMDiT")


def linears(spec: ModelSpec) -> dict[str, Parameter]:
    """The weight of every linear layer, by the layer's path, in the order of the weights file."""
    found = {}
    for parameter in parameters(spec):
        module, _, leaf = parameter.path.rpartition(".")
        if leaf == "weight" and any(pattern.fullmatch(module) for _, pattern in _ROLES):
            found[module] = parameter
    return found
