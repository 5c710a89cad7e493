"""Residuals with a gate of each sample, as diffusers and others write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import Case
from torch import Tensor, nn

_C = 8
_X = (torch.arange(3 * 5 * _C, dtype=torch.float32).reshape(3, 5, _C) * 7 % 31 - 15) / 8
_GATE = torch.arange(3 * _C, dtype=torch.float32).reshape(3, _C) / 8 - 1
_REFERENCES = torch.arange(5).reshape(5, 1) % 2 == 0
_AXES = {"x": {0: "batch", 1: "tokens"}, "gate": {0: "batch"}}

Residual = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, the gate of each sample, and what a layer makes of x


class _Of(nn.Module):
    """[B, N, C], [B, C] → [B, N, C]"""

    def __init__(self, function: Residual):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(_C, _C, bias=False)
        self.layer_scale = nn.Parameter(torch.arange(_C) / 4)
        with torch.no_grad():
            self.layer.weight.copy_((torch.arange(_C * _C).reshape(_C, _C) * 7 % 31 - 15) / 64)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.function(x, gate, self.layer(x))


class _ByToken(_Of):
    """As Qwen-Image-Edit-2511 does: references have another gate."""

    def __init__(self) -> None:
        super().__init__(lambda x, gate, y: x + gate * y)

    def forward(self, x: Tensor, gate: Tensor, references: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.where(references, -gate[:, None], gate[:, None]))


class _LayerScale(_Of):
    def __init__(self) -> None:
        super().__init__(lambda x, gate, y: x + gate * y)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x + gate[:, None], self.layer_scale)


def _case(name: str, module: nn.Module | Residual, count: int = 1, *, half: bool = False) -> Case:
    module = module if isinstance(module, nn.Module) else _Of(module)
    inputs = {"x": _X.half(), "gate": _GATE.half()} if half else {"x": _X, "gate": _GATE}
    return Case(name, module.half() if half else module, inputs, _AXES, {"MMDiTGatedResidual": count})


CASES = (
    _case("gate_first", lambda x, gate, y: x + gate.unsqueeze(1) * y),
    _case("gate_last", lambda x, gate, y: y * gate[:, None, :] + x),
    _case("addcmul", lambda x, gate, y: torch.addcmul(x, gate[:, None], y)),
    _case("tanh", lambda x, gate, y: x + gate.tanh().unsqueeze(1) * y),
    _case("twice", lambda x, gate, y: x + gate[:, None] * y + (1 - gate[:, None]) * y.flip(-1), 2),
    _case("fp16_clipped", lambda x, gate, y: (x + gate[:, None] * y).clip(-65504, 65504), half=True),
    _case("fp32_inside", lambda x, gate, y: (x.float() + gate[:, None].float() * y.float()).to(x.dtype), half=True),
    Case(
        "by_token",
        _ByToken(),
        {"x": _X, "gate": _GATE, "references": _REFERENCES},
        {**_AXES, "references": {0: "tokens"}},
        {"MMDiTGatedResidual": 1},
    ),
    _case("layer_scale", _LayerScale(), 0),
    _case("number", lambda x, gate, y: x + gate[:, None] + 0.5 * y, 0),
    _case("of_each_token", lambda x, gate, y: x + (gate[:, None] + x) * y, 0),
)
