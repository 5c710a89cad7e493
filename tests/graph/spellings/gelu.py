"""GELU, in its tanh form and exact: torch's and transformers', and every order of the factors."""

from __future__ import annotations

import math

import torch
from case import Case
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation, QuickGELUActivation

_HALF = torch.float16
_SLOPE = math.sqrt(2 / math.pi)


class _Erf(nn.Module):
    """The factors in every order, the root divided by or multiplied with. Each GELU is that of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        x = 0.5 * (x * (torch.erf(x * math.sqrt(0.5)) + 1))
        x = (1 + torch.erf(0.70710678 * x)) * x / 2
        x = x / 2 * (torch.erf(x / torch.sqrt(torch.tensor(2.0, dtype=x.dtype))) + 1)
        return (torch.erf(x / 1.41421356) + 1) * 0.5 * x


class _Tanh(nn.Module):
    """The polynomial in other forms."""

    def forward(self, x: Tensor) -> Tensor:
        x = 0.5 * x * (1 + torch.tanh(_SLOPE * (x + 0.044715 * x * x * x)))
        x = x * (0.5 * (torch.tanh(_SLOPE * x * (1 + 0.044715 * x**2)) + 1))
        return 0.5 * (x * (1 + torch.tanh((0.044715 * x**3 + x) * _SLOPE)))


class _OfSum(nn.Module):
    """Of a sum and of a product, as after a linear layer and in a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bias
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))
        x = 0.7 * x
        return x * (1 + torch.tanh(_SLOPE * (x + 0.044715 * x * x * x))) * 0.5


class _Other(nn.Module):
    """What looks like it: other constants, no half, another x."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "slope":
            return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x * x * x)))
        if self.form == "cube":
            return 0.5 * x * (1 + torch.tanh(_SLOPE * (x + 0.04 * x * x * x)))
        if self.form == "root":
            return 0.5 * x * (1 + torch.erf(x / 1.5))
        if self.form == "twice":
            return x * (1 + torch.erf(x / math.sqrt(2.0)))
        return 0.5 * x * (1 + torch.erf(x.flip(-1) / math.sqrt(2.0)))


def _case(name: str, module: nn.Module, gelus: int, dtype: torch.dtype = torch.float32, argument: str = "x") -> Case:
    x = (torch.arange(3 * 5 * 8).reshape(3, 5, 8) / 20 - 3).to(dtype)
    return Case(name, module, {argument: x}, {argument: {0: "batch", 1: "tokens"}}, {"Gelu": gelus})


CASES = (
    _case("tanh", nn.GELU(approximate="tanh"), 1, argument="input"),
    _case("erf", nn.GELU(), 1, argument="input"),
    _case("tanh_fp16", nn.GELU(approximate="tanh"), 1, _HALF, "input"),
    _case("erf_fp16", nn.GELU(), 1, _HALF, "input"),
    _case("orders_erf", _Erf(), 5),
    _case("orders_erf_fp16", _Erf(), 5, _HALF),
    _case("orders_tanh", _Tanh(), 3),
    _case("orders_tanh_fp16", _Tanh(), 3, _HALF),
    _case("of_sum", _OfSum(), 2),
    _case("new", NewGELUActivation(), 1, argument="input"),
    _case("new_fp16", NewGELUActivation(), 1, _HALF, "input"),
    _case("fast", FastGELUActivation(), 1, argument="input"),
    _case("quick", QuickGELUActivation(), 0, argument="input"),
    _case("other_slope", _Other("slope"), 0),
    _case("other_cube", _Other("cube"), 0),
    _case("other_cube_fp16", _Other("cube"), 0, _HALF),
    _case("other_root", _Other("root"), 0),
    _case("twice", _Other("twice"), 0),
    _case("of_another", _Other("another"), 0),
)
