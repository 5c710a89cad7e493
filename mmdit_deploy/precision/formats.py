"""The number formats of quantized weights and inputs, in torch: rounding that saturates, and packing.

All round half to even. fp32 in, fp32 out: the values that the format has, not its bits.

    fp8   E4M3: 3 bits of mantissa, ±448      int8  -128 … 127
    fp4   E2M1: 0 ½ 1 1½ 2 3 4 6, ±           int4  -8 … 7
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {"fp8": 448.0, "int8": 127.0, "fp4": 6.0, "int4": 7.0}
"""What the largest magnitude is mapped to: scales are symmetric, and the integers' lowest is left to what they clip."""
_LEAST = {"fp8": -448.0, "int8": -128.0, "fp4": -6.0, "int4": -8.0}


def rounded(values: Tensor, form: str) -> Tensor:
    """To the nearest value of a format; beyond its range, its end. NaN stays NaN.

    Args:
        values: fp32, of any shape, divided by their scale.
        form: one of `LARGEST`.
    """
    # torch casts what is beyond ±448 to NaN
    inside = values.clamp(_LEAST[form], LARGEST[form])
    if form == "fp8":
        return inside.to(torch.float8_e4m3fn).float()
    if form == "fp4":
        step = torch.ones_like(inside).masked_fill_(inside.abs() < 2, 0.5).masked_fill_(inside.abs() > 4, 2)
        return (inside / step).round_().mul_(step)
    return inside.round_()


def encode(values: Tensor, form: str) -> Tensor:
    """Values of a format [out, in] as they are stored: [out, in], or [out, in / 2] bytes of two, the first one low."""
    if form == "fp8":
        return values.to(torch.float8_e4m3fn)
    if form == "int8":
        return values.to(torch.int8)
    codes = (values.to(torch.int8) & 15).to(torch.uint8) if form == "int4" else _e2m1_codes(values)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode(stored: Tensor, form: str) -> Tensor:
    """The values that `encode` stored, fp32 [out, in]."""
    if form in ("fp8", "int8"):
        return stored.float()
    codes = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
    return _VALUES[form][codes.int()]


def _e2m1_codes(values: Tensor) -> Tensor:
    size = values.abs()
    codes = torch.where(size <= 2, size * 2, torch.where(size <= 4, size + 2, size / 2 + 4)).to(torch.uint8)
    return codes | values.signbit().to(torch.uint8) << 3


_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = {
    "fp4": torch.tensor([*_E2M1, *(-v for v in _E2M1)]),
    "int4": torch.tensor([*map(float, range(8)), *map(float, range(-8, 0))]),
}
