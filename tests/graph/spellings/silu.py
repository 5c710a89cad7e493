"""SiLU: torch's, and as papers write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import Case
from torch import Tensor, nn
from torch.nn import functional as F

_X = torch.arange(3 * 5 * 8, dtype=torch.float32).reshape(3, 5, 8) / 10 - 6
_AXES = {"x": {0: "batch", 1: "tokens"}}


class _Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _case(name: str, function: Callable[[Tensor], Tensor], count: int = 1, x: Tensor = _X) -> Case:
    return Case(name, _Of(function), {"x": x}, _AXES, {"MMDiTSiLU": count})


CASES = (
    _case("torch", F.silu),
    _case("sigmoid_first", lambda x: torch.sigmoid(x) * x),
    _case("quotient", lambda x: x / (1 + torch.exp(-x))),
    _case("quotient_one_last", lambda x: x / (torch.exp(-x) + 1)),
    _case("fp16", F.silu, x=_X.half()),
    _case("fp16_upcast", lambda x: F.silu(x.float()).to(x.dtype), x=_X.half()),
    _case("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), 0),
    _case("gate_of_another", lambda x: x * torch.sigmoid(x.flip(-1)), 0),
    _case("other_base", lambda x: x / (2 + torch.exp(-x)), 0),
)
