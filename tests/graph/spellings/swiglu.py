"""SwiGLU: of two halves of one projection, in either order, and of two projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import Case
from diffusers.models.activations import SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

_X = torch.arange(3 * 5 * 8, dtype=torch.float32).reshape(3, 5, 8) / 20 - 3
_AXES = {0: "batch", 1: "tokens"}


class _Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _filled(module: nn.Module) -> nn.Module:
    """Weights from integers, exact in fp16."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            count = torch.arange(parameter.numel()).reshape(parameter.shape) + i  # equal ones would be merged
            parameter.copy_((count * 7 % 31 - 15) / 64)
    return module


def _flux2(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _value_first(x: Tensor) -> Tensor:
    value, gate = x.split([4, 4], dim=-1)
    return value * F.silu(gate)


def _of_sigmoid(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * value


def _channel_attention(x: Tensor) -> Tensor:
    return x * F.silu(x.mean(1, keepdim=True))


def _upcast(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate.float()).to(x.dtype) * value


def _case(name: str, module: nn.Module, count: int = 1, x: Tensor = _X) -> Case:
    argument = {SwiGLU: "hidden_states"}.get(type(module), "x")
    return Case(name, module, {argument: x}, {argument: _AXES}, {"MMDiTSwiGLU": count})


_LLAMA = LlamaConfig(hidden_size=8, intermediate_size=6, num_attention_heads=2, vocab_size=16)

CASES = (
    _case("chunk", _Of(_flux2)),
    _case("value_first", _Of(_value_first)),
    _case("slices", _Of(lambda x: F.silu(x[..., :4]) * x[..., 4:])),
    _case("sigmoid", _Of(_of_sigmoid)),
    _case("diffusers", _filled(SwiGLU(8, 6))),
    _case("llama", _filled(LlamaMLP(_LLAMA))),
    _case("fp16", _Of(_flux2), x=_X.half()),
    _case("channel_attention", _Of(_channel_attention), 0),
    _case("fp16_upcast", _Of(_upcast), 0, _X.half()),
    _case("scaled", _Of(lambda x: F.silu(x) / 0.596), 0),
)
