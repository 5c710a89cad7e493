"""RMSNorm: torch's, diffusers', and as language models and papers write it."""

from __future__ import annotations

import torch
from case import Case
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

_EPS = 1e-6
_D = 8


def _weighted(module: nn.Module) -> nn.Module:
    """With a weight that is neither 1 nor the same for two channels; all are exact in fp16."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            count = torch.arange(1, parameter.numel() + 1).reshape(parameter.shape) / 8
            parameter.copy_(0.5 - count if name.endswith("bias") else count)
    return module


class _Heads(nn.Module):
    """Q of a projection, normalized by head as FLUX.2 and Qwen-Image do. [B, N, H·D] → [B, N, H, D]"""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = _weighted(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(-1, (2, -1)))


class _HeadsFirst(_Heads):
    """As SD3 does. [B, N, H·D] → [B, H, N, D]"""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(x.shape[0], -1, 2, x.shape[-1] // 2).transpose(1, 2))


class _Quotient(nn.Module):
    """As in the paper (Zhang & Sennrich 2019): divided by the root, the square by a product, the weight first."""

    def __init__(self, dims: tuple[int, ...] = (-1,)):
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.ones(_D))
        _weighted(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / torch.sqrt(_EPS + (x * x).mean(self.dims, keepdim=True)))


class _MinusHalf(nn.Module):
    """The square root as a power, the axis counted from the front, and a weight with axes of one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1, _D + 1).reshape(1, 1, _D) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x**2).mean(2, keepdim=True).add(_EPS).pow(-0.5) * x * self.weight


class _WeightInside(nn.Module):
    """All in fp32, the weight too; cast back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_D))
        _weighted(self)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + _EPS)
        return (normed * self.weight.float()).to(x.dtype)


class _CastFactor(nn.Module):
    """The factor is made in fp32 and cast; x is multiplied as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(_D))
        _weighted(self)

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.rsqrt(torch.mean(x.float() ** 2, dim=-1, keepdim=True) + _EPS)
        return x * factor.to(x.dtype) * self.scale


class _SumOfSquares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + _EPS)


class _Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class _NoEpsilon(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True))


def _case(
    name: str,
    module: nn.Module,
    norms: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    argument: str = "x",
    channels: int = _D,
    exporters: tuple[str, ...] = ("dynamo", "torchscript"),
) -> Case:
    x = (torch.arange(3 * 5 * channels).remainder(17) - 7).reshape(3, 5, channels) / 8
    inputs, axes = {argument: x.to(dtype)}, {argument: {0: "batch", 1: "tokens"}}
    return Case(name, module, inputs, axes, {"RMSNormalization": norms}, exporters)


_HALF = torch.float16
_DYNAMO = ("dynamo",)  # torch.nn.RMSNorm; TorchScript has no rms_norm

CASES = (
    _case("torch", _weighted(nn.RMSNorm(_D, _EPS)), exporters=_DYNAMO),
    _case("torch_fp16", _weighted(nn.RMSNorm(_D, _EPS)).half(), dtype=_HALF, exporters=_DYNAMO),
    _case("torch_no_weight", nn.RMSNorm(_D, _EPS, elementwise_affine=False), exporters=_DYNAMO),
    _case("diffusers", _weighted(RMSNorm(_D, _EPS)), argument="hidden_states"),
    _case("diffusers_fp16", _weighted(RMSNorm(_D, _EPS)).half(), dtype=_HALF, argument="hidden_states"),
    _case("diffusers_bias", _weighted(RMSNorm(_D, _EPS, bias=True)), argument="hidden_states"),
    _case("diffusers_fp32_weight", _weighted(RMSNorm(_D, _EPS)), dtype=_HALF, argument="hidden_states"),
    _case("diffusers_no_weight", RMSNorm(_D, _EPS, elementwise_affine=False), dtype=_HALF, argument="hidden_states"),
    _case("heads", _Heads(nn.RMSNorm(_D, _EPS)), channels=2 * _D, exporters=_DYNAMO),
    _case("heads_fp16", _Heads(RMSNorm(_D, _EPS)).half(), dtype=_HALF, channels=2 * _D, exporters=_DYNAMO),
    _case("heads_first", _HeadsFirst(RMSNorm(_D, _EPS)), channels=2 * _D),
    _case("heads_first_fp16", _HeadsFirst(RMSNorm(_D, _EPS)).half(), dtype=_HALF, channels=2 * _D),
    _case("llama", _weighted(LlamaRMSNorm(_D, _EPS)), argument="hidden_states"),
    _case("llama_fp16", _weighted(LlamaRMSNorm(_D, _EPS)).half(), dtype=_HALF, argument="hidden_states"),
    _case("t5_fp16", _weighted(T5LayerNorm(_D, _EPS)).half(), dtype=_HALF, argument="hidden_states"),
    _case("quotient", _Quotient()),
    _case("quotient_fp16", _Quotient().half(), dtype=_HALF),
    _case("minus_half", _MinusHalf()),
    _case("weight_inside_fp16", _WeightInside().half(), dtype=_HALF),
    _case("cast_factor_fp16", _CastFactor().half(), dtype=_HALF),
    _case("over_tokens", _Quotient((1,)), 0),
    _case("sum_of_squares", _SumOfSquares(), 0),
    _case("unit_length", _Unit(), 0),
    _case("no_epsilon", _NoEpsilon(), 0),
)
