"""How a linear layer can be quantized, and the tensors that it is stored as.

y = x · Wᵀ + b, W [out, in]. What each scheme computes (⌊·⌉ rounds to the format and saturates):

    fp8          y = (s_x ⌊x / s_x⌉) · (s_w ⌊W / (c s_w)⌉)ᵀ · c + b     c [out]: a row's largest over all rows' largest
    fp8-token    the same; s_x is each token's own largest |x| / 448, found while running
    fp8-weights  x as it is
    int8         x · p first, p [in] (SmoothQuant's, folded into W as 1 / p); s_x is each token's own largest / 127
    int8-tensor  the same; s_x is one number, from calibration
    fp4          NVFP4: W in blocks of 16 inputs, each with an E4M3 scale times one fp32 scale; x likewise, its blocks'
                 scales found while running
    w4a16        W in blocks of `block` inputs of INT4, x as it is

The row's share c is a product of its own and not part of the weight's scale: TensorRT writes sums that a scale by
channel has not been applied to, and these overflow fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is quantized.

    Args:
        name: as in recipes and manifests.
        weights: the format of weights: ``fp8`` is E4M3, ``fp4`` E2M1.
        activations: what shares a scale of the input: the whole ``tensor`` (calibrated), a ``token`` or a ``block``
            (both found while running); ``none`` where the input is not quantized.
        block: how many inputs of a row of weights share a scale; None where the row does.
        smooth: whether the input is multiplied by a factor per channel first (SmoothQuant, arXiv:2211.10438).
    """

    name: str
    weights: Literal["fp8", "int8", "fp4", "int4"]
    activations: Literal["none", "tensor", "token", "block"]
    block: int | None = None
    smooth: bool = False

    @property
    def packed(self) -> bool:
        """Two weights lie in a byte, the first in its low half."""
        return self.weights in ("fp4", "int4")


SCHEMES = {
    s.name: s
    for s in (
        Scheme("fp8", "fp8", "tensor"),
        Scheme("fp8-token", "fp8", "token"),
        Scheme("fp8-weights", "fp8", "none"),
        Scheme("int8", "int8", "token", smooth=True),
        Scheme("int8-tensor", "int8", "tensor", smooth=True),
        Scheme("fp4", "fp4", "block", block=16),
        Scheme("w4a16", "int4", "none", block=64),
    )
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a quantized linear layer in the weights file, and input of its function.

    Args:
        name: after the layer's path and a dot: ``weight``, ``weight_scale``, …
        dtype: in the file; packed weights are bytes there.
        shape: in the file.
        onnx: ONNX's type by its name in upper case, e.g. ``FLOAT8E4M3FN``, ``FLOAT4E2M1``, ``INT4``.
        logical: the shape that ONNX sees: twice as many columns where two weights lie in a byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    onnx: str
    logical: tuple[int, ...]


_WEIGHTS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "fp4": torch.uint8, "int4": torch.uint8}
_ONNX = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float8_e4m3fn: "FLOAT8E4M3FN",
    torch.int8: "INT8",
}
_PACKED = {"fp4": "FLOAT4E2M1", "int4": "INT4"}


def stored(scheme: Scheme, rows: int, columns: int, compute: torch.dtype) -> tuple[Stored, ...]:
    """The tensors of a linear layer of so many outputs and inputs, its bias apart; the weight is the first.

    In this order they are inputs of a function, in place of the weight:

    - ``weight`` [out, in], or [out, in / 2] bytes where two lie in one
    - ``weight_scale``: s_w [] in the compute type; of ``fp4`` E4M3 and of ``w4a16`` in the compute type
      [out, in / block]
    - ``weight_scale_2`` [] fp32, of ``fp4``: what its blocks' scales are multiplied by
    - ``channel_scale`` [out] in the compute type, where a row shares a scale: c
    - ``input_scale`` [], where it is calibrated: s_x in the compute type; of ``fp4`` fp32: what the scales of the
      input's blocks are multiplied by
    - ``pre_quant_scale`` [in] in the compute type, of a smoothed input: p

    Raises:
        ValueError: the inputs are no multiple of a block.
    """
    if scheme.block and columns % scheme.block:
        raise ValueError(f"{scheme.name} takes blocks of {scheme.block} inputs, not {columns} inputs")
    weight = _WEIGHTS[scheme.weights]
    tensors = [_plain("weight", weight, (rows, columns))]
    if scheme.packed:
        tensors = [Stored("weight", weight, (rows, columns // 2), _PACKED[scheme.weights], (rows, columns))]
    if scheme.block:
        of_blocks = torch.float8_e4m3fn if scheme.weights == "fp4" else compute
        tensors.append(_plain("weight_scale", of_blocks, (rows, columns // scheme.block)))
    else:
        tensors.append(_plain("weight_scale", compute, ()))
        tensors.append(_plain("channel_scale", compute, (rows,)))
    if scheme.weights == "fp4":
        tensors.append(_plain("weight_scale_2", torch.float32, ()))
        tensors.append(_plain("input_scale", torch.float32, ()))
    elif scheme.activations == "tensor":
        tensors.append(_plain("input_scale", compute, ()))
    if scheme.smooth:
        tensors.append(_plain("pre_quant_scale", compute, (columns,)))
    return tuple(tensors)


def _plain(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
    return Stored(name, dtype, shape, _ONNX.get(dtype, "UINT8"), shape)
