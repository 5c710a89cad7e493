"""GELU, in its tanh form and exact."""

from __future__ import annotations

import torch
from case import Case
from torch import nn

_X = torch.arange(3 * 5 * 8, dtype=torch.float32).reshape(3, 5, 8) / 60 - 1
_AXES = {"x": {0: "batch", 1: "tokens"}}

CASES = (
    Case("tanh", nn.GELU(approximate="tanh"), {"input": _X}, {"input": _AXES["x"]}, {"Gelu": 1}),
    Case("erf", nn.GELU(), {"input": _X}, {"input": _AXES["x"]}, {"Gelu": 1}),
)
