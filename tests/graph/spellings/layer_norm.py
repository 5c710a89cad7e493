"""LayerNorm: torch's, diffusers' with and without modulation, and as papers write it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from case import Case
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, FP32LayerNorm
from torch import Tensor, nn

_EPS = 1e-6
_D = 8
_HALF = torch.float16


def _weighted(module: nn.Module) -> nn.Module:
    """With weights that are not all alike; all are exact in fp16."""
    with torch.no_grad():
        for parameter in module.parameters():
            count = torch.arange(parameter.numel()).remainder(11).reshape(parameter.shape)
            parameter.copy_((count - 4) / 8)
    return module


class _AdaLNZero(nn.Module):
    """The first norm of an SD3 or FLUX block; of its six modulations only two are used here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _weighted(AdaLayerNormZero(_D))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.norm(x, emb=emb)[0]


class _Papers(nn.Module):
    """Mean, variance, quotient, weight, bias."""

    def __init__(self, *, dims: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.dims = dims
        self.weight, self.bias = nn.Parameter(torch.ones(_D)), nn.Parameter(torch.ones(_D))
        _weighted(self)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.dims, keepdim=True)
        variance = ((x - mean) ** 2).mean(self.dims, keepdim=True)
        return self.bias + self.weight * ((x - mean) / torch.sqrt(variance + _EPS))


class _Upcast(_Papers):
    """In fp32, weight and bias after the cast back."""

    def forward(self, x: Tensor) -> Tensor:
        deviation = x.float() - x.float().mean(-1, keepdim=True)
        normed = deviation * torch.rsqrt(deviation.pow(2).mean(-1, keepdim=True) + _EPS)
        return normed.to(x.dtype) * self.weight + self.bias


class _Variance(nn.Module):
    """torch.var divides by N, or by N − 1 (which is no LayerNorm)."""

    def __init__(self, *, unbiased: bool) -> None:
        super().__init__()
        self.unbiased = unbiased

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(-1, keepdim=True, unbiased=self.unbiased)
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + _EPS)


class _EpsilonOutside(nn.Module):
    """As "The Annotated Transformer" has it: epsilon is added to the deviation and not to the variance."""

    def forward(self, x: Tensor) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / (deviation.pow(2).mean(-1, keepdim=True).sqrt() + _EPS)


def _x(dtype: torch.dtype, *shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return ((torch.arange(count).remainder(17) - 7).reshape(shape) / 8).to(dtype)


def _case(
    name: str,
    module: nn.Module,
    norms: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    argument: str = "x",
    inner: tuple[int, ...] = (_D,),
    more: Mapping[str, Tensor] | None = None,
) -> Case:
    inputs = {argument: _x(dtype, 3, 5, *inner), **(more or {})}
    axes = {argument: {0: "batch", 1: "tokens"}, **{other: {0: "batch"} for other in more or {}}}
    return Case(name, module, inputs, axes, {"LayerNormalization": norms})


def _continuous() -> nn.Module:
    """The last norm of a model."""
    return _weighted(AdaLayerNormContinuous(_D, 4, elementwise_affine=False, eps=_EPS))


def _embedding(dtype: torch.dtype, width: int) -> Tensor:
    return _x(dtype, 3, width)


CASES = (
    _case("torch", _weighted(nn.LayerNorm(_D)), argument="input"),
    _case("torch_fp16", _weighted(nn.LayerNorm(_D, _EPS)).half(), dtype=_HALF, argument="input"),
    _case("torch_no_bias", _weighted(nn.LayerNorm(_D, _EPS, bias=False)), argument="input"),
    _case("torch_no_weight", nn.LayerNorm(_D, _EPS, elementwise_affine=False), argument="input"),
    _case(
        "torch_no_weight_fp16", nn.LayerNorm(_D, _EPS, elementwise_affine=False).half(), dtype=_HALF, argument="input"
    ),
    _case("torch_two_axes", _weighted(nn.LayerNorm((2, _D), _EPS)), argument="input", inner=(2, _D)),
    _case("fp32_of_fp16", _weighted(FP32LayerNorm(_D, _EPS)).half(), dtype=_HALF, argument="inputs"),
    _case("fp32_no_weight", FP32LayerNorm(_D, _EPS, False), dtype=_HALF, argument="inputs"),
    _case("continuous", _continuous(), more={"conditioning_embedding": _embedding(torch.float32, 4)}),
    _case("continuous_fp16", _continuous().half(), 1, _HALF, more={"conditioning_embedding": _embedding(_HALF, 4)}),
    _case("zero", _AdaLNZero(), more={"emb": _embedding(torch.float32, _D)}),
    _case("zero_fp16", _AdaLNZero().half(), 1, _HALF, more={"emb": _embedding(_HALF, _D)}),
    _case("papers", _Papers()),
    _case("upcast_fp16", _Upcast().half(), dtype=_HALF),
    _case("variance", _Variance(unbiased=False)),
    _case("over_tokens", _Papers(dims=(1,)), 0),
    _case("unbiased", _Variance(unbiased=True), 0),
    _case("epsilon_outside", _EpsilonOutside(), 0),
)
