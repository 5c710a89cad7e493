"""AdaLN's modulation, as diffusers, Black Forest Labs and others write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import Case
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn
from torch.nn import functional as F

_C = 8
_X = (torch.arange(3 * 5 * _C, dtype=torch.float32).reshape(3, 5, _C) * 7 % 31 - 15) / 8
_VECTOR = torch.arange(3 * 2 * _C, dtype=torch.float32).reshape(3, 2 * _C) / 16 - 1
_REFERENCES = torch.arange(5).reshape(5, 1) % 2 == 0
_AXES = {"x": {0: "batch", 1: "tokens"}, "vector": {0: "batch"}}

Modulate = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, scale and shift of each sample


class _Of(nn.Module):
    """A modulation by the two halves of a vector. [B, N, C], [B, 2·C] → [B, N, C]"""

    def __init__(self, function: Modulate):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.function(x, *vector.chunk(2, dim=-1))


class _ByToken(nn.Module):
    """As Qwen-Image-Edit-2511 does: references are modulated by other vectors."""

    def forward(self, x: Tensor, vector: Tensor, references: Tensor) -> Tensor:
        scale, shift = vector[:, None].chunk(2, dim=-1)
        scale, shift = (torch.where(references, -t, t) for t in (scale, shift))
        return _norm(x) * (1 + scale) + shift


class _Diffusers(nn.Module):
    """A norm of diffusers with its own projection; of what it returns, what is modulated."""

    def __init__(self, norm: nn.Module, *outputs: int):
        super().__init__()
        self.norm, self.outputs = _filled(norm), outputs

    def forward(self, x: Tensor, vector: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.outputs:
            return self.norm(x, vector)
        made = self.norm(x, emb=vector)
        return tuple(made[i] for i in self.outputs)


def _filled(module: nn.Module) -> nn.Module:
    """Weights from integers, exact in fp16."""
    with torch.no_grad():
        for parameter in module.parameters():
            count = torch.arange(parameter.numel()).reshape(parameter.shape)
            parameter.copy_((count * 7 % 31 - 15) / 64)
    return module


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (_C,), eps=1e-6)


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (_C,), eps=1e-6)


def _case(name: str, function: Modulate, count: int = 1, *, half: bool = False) -> Case:
    x, vector = (_X.half(), _VECTOR.half()) if half else (_X, _VECTOR)
    return Case(name, _Of(function), {"x": x, "vector": vector}, _AXES, {"MMDiTModulate": count})


def _diffusers(name: str, norm: nn.Module, *outputs: int) -> Case:
    inputs = {"x": _X, "vector": _VECTOR[:, :_C]}
    return Case(name, _Diffusers(norm, *outputs), inputs, _AXES, {"MMDiTModulate": max(1, len(outputs))})


def _fp32_inside(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As Wan does."""
    return (_norm(x.float()) * (1 + scale[:, None].float()) + shift[:, None].float()).to(x.dtype)


CASES = (
    _case("unsqueezed_first", lambda x, scale, shift: _norm(x) * (1 + scale[:, None]) + shift[:, None]),
    _case("unsqueezed_last", lambda x, scale, shift: (1 + scale)[:, None, :] * _norm(x) + shift[:, None, :]),
    _case("one_last", lambda x, scale, shift: shift.unsqueeze(1) + (scale.unsqueeze(1) + 1) * _norm(x)),
    _case("reshaped", lambda x, scale, shift: _norm(x) * (1 + scale).view(-1, 1, _C) + shift.view(-1, 1, _C)),
    _case("addcmul", lambda x, scale, shift: torch.addcmul(shift[:, None], _norm(x), 1 + scale[:, None])),
    _case("rms", lambda x, scale, shift: _rms(x) * (1 + scale[:, None]) + shift[:, None]),
    _case("fp16", lambda x, scale, shift: _norm(x) * (1 + scale[:, None]) + shift[:, None], half=True),
    _case("fp32_inside", _fp32_inside, half=True),
    _case(
        "fp32_norm",
        lambda x, scale, shift: _norm(x.float()).to(x.dtype) * (1 + scale[:, None]) + shift[:, None],
        half=True,
    ),
    Case(
        "by_token",
        _ByToken(),
        {"x": _X, "vector": _VECTOR, "references": _REFERENCES},
        {**_AXES, "references": {0: "tokens"}},
        {"MMDiTModulate": 1},
    ),
    _diffusers("diffusers_zero", AdaLayerNormZero(_C, None), 0),
    _diffusers("diffusers_dual", SD35AdaLayerNormZeroX(_C), 0, 5),
    _diffusers("diffusers_continuous", AdaLayerNormContinuous(_C, _C, elementwise_affine=False, eps=1e-6)),
    _case("no_one", lambda x, scale, shift: _norm(x) * scale[:, None] + shift[:, None], 0),
    _case("no_shift", lambda x, scale, shift: _norm(x) * (1 + scale[:, None]), 0),
    _case("no_norm", lambda x, scale, shift: x * (1 + scale[:, None]) + shift[:, None], 0),
)
