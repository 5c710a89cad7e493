"""Inputs for engines of real models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.contract import Contract


def random_inputs(contract: Contract, sizes: Mapping[str, int], seed: int = 8) -> dict[str, Tensor]:
    """Normally distributed values for every input of a contract, on the CPU; `sizes` gives each axis's."""
    return {
        t.name: random_tensor(seed, t.name, t.shape(sizes), std=1.0, dtype=getattr(torch, t.dtype))
        for t in contract.inputs
    }
