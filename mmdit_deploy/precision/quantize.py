"""Quantized linear layers in torch: the tensors that are stored, and what the layer computes with them.

`schemes.py` has the formulas. Scalars and factors in the compute type are rounded to it *first*, and weights and inputs
are divided by the rounded ones, so that what the graph multiplies by is what was divided by, to the bit.

Scales in the compute type are 2^-14 or more: below that fp16 is subnormal, loses bits, and may be flushed to zero. A
tensor whose scale would be smaller uses less of its format's range; of weights the row's factor `c` makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmdit_deploy.precision.formats import LARGEST, decode, encode, rounded
from mmdit_deploy.precision.plan import AttentionScales, LinearPlan
from mmdit_deploy.precision.schemes import Scheme

LEAST_SCALE = 2.0**-14  # fp16's smallest normal number
LEAST_E4M3 = 2.0**-9  # a block's scale is not rounded to 0, which nothing can be divided by
# Calibrated scales in FP8 leave an octave above the largest value that was seen: floats have as many steps there as in
# any other, so that it costs nothing, and what other prompts make larger does not saturate.
_HEADROOM = 2.0
# Weights alone in FP8 share one scale in all layers, so that products of one input can be made as one (batched
# modulation); `c` has the rest. At this power of two E4M3's normal numbers are normal in fp16 too.
_SHARED_SCALE = 2.0**-8
# Scales of weights are tried at these multiples of the one that just takes the largest; the least squared error wins.
# FP8's steps grow with the magnitude: what counts is where in an octave the values lie. 1.5 makes a block's largest
# E2M1's 4 instead of 6, where the steps are finer. INT4 gains by clipping, INT8 does not. Relative L2 error of normal
# random weights, by the first alone and searched: fp8 2.64 and 2.58 %, fp4 9.5 and 8.4 %, int4 10.8 and 9.6 %.
_MULTIPLES = {
    "fp8": (1.0, 1.19, 1.41, 1.68),
    "int8": (1.0,),
    "fp4": (1.0, 1.5, 0.9, 0.8),
    "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.7),
}
_CHUNK = 2**18  # values searched at once: the candidates stay in a core's cache

Tensors = Mapping[str, Tensor]


def quantize_weight(weight: Tensor, plan: LinearPlan, compute: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a quantized linear layer: those of `stored`, in that order.

    Args:
        weight: fp32 [out, in].
        compute: fp16, bf16 or fp32.

    Raises:
        ValueError: the scheme wants what calibration finds, and the plan has none; or `in` is no multiple of a block.
    """
    scheme = plan.scheme
    tensors: dict[str, Tensor] = {}
    if scheme.smooth:
        if plan.pre_quant_scale is None:
            raise ValueError(f"{scheme.name} smooths its input: the plan has no pre_quant_scale")
        tensors["pre_quant_scale"] = scale_of(plan.pre_quant_scale, compute)
        weight = weight / tensors["pre_quant_scale"].float()
    if scheme.block:
        tensors |= _quantize_blocks(weight, scheme, compute)
    else:
        tensors |= _quantize_rows(weight, scheme, compute)
    if scheme.activations in ("tensor", "block"):
        if plan.input_amax is None:
            raise ValueError(f"{scheme.name} has a calibrated scale of its input: the plan has no input_amax")
        tensors["input_scale"] = _input_scale(plan.input_amax, scheme, compute)
    return {name: tensors[name] for name in _ORDER if name in tensors}


def dequantize(tensors: Tensors, scheme: Scheme) -> Tensor:
    """What the layer's weights are worth: fp32 [out, in] for inputs as they are, with smoothing undone."""
    weight = _values(tensors, scheme)
    return weight * tensors["pre_quant_scale"].float() if scheme.smooth else weight


def simulate(x: Tensor, tensors: Tensors, scheme: Scheme, compute: torch.dtype | None = None) -> Tensor:
    """x · Wᵀ as the scheme computes it, summed in fp32.

    Args:
        x: fp32 [..., in].
        tensors: of `quantize_weight`.
        compute: the type that the graph has `x` in, smooths it in, and finds scales in; None for fp32.

    Returns:
        fp32 [..., out], without a bias.
    """
    return torch.nn.functional.linear(quantized_input(x, tensors, scheme, compute), _values(tensors, scheme))


def quantized_input(x: Tensor, tensors: Tensors, scheme: Scheme, compute: torch.dtype | None = None) -> Tensor:
    """The input that the product is made of: smoothed, quantized and dequantized; fp32 [..., in]."""
    x = _cast(x, compute)
    if scheme.smooth:
        x = _cast(x * tensors["pre_quant_scale"].float(), compute)
    if scheme.activations == "none":
        return x
    if scheme.activations == "block":
        return _nvfp4(x, tensors["input_scale"].float(), scheme, compute)
    largest = LARGEST[scheme.weights]
    if scheme.activations == "token":  # divided by its largest first: the graph's scale is a constant then
        peak, unit = (
            scale_of(value, compute or torch.float32).float() for value in (x.abs().amax(-1, keepdim=True), 1 / largest)
        )
        return rounded(_cast(x / peak, compute) / unit, scheme.weights) * unit * peak
    scale = tensors["input_scale"].float()
    return rounded(x / scale, scheme.weights) * scale


def scale_of(values: Tensor | float, compute: torch.dtype) -> Tensor:
    """Scales as they are stored and computed with: rounded to the compute type, and 2^-14 or more."""
    return torch.as_tensor(values, dtype=torch.float32).clamp(min=LEAST_SCALE).to(compute)


def attention_scales(amax: AttentionScales, head_dim: int, compute: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The scales of Q, K and V [] of an FP8 attention; Q's is that of Q / √D, which is what is quantized."""
    sizes = (amax.q_amax / math.sqrt(head_dim), amax.k_amax, amax.v_amax)
    q, k, v = (scale_of(_HEADROOM * size / LARGEST["fp8"], compute) for size in sizes)
    return q, k, v


def simulate_attention(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None
) -> Tensor:
    """An attention in FP8: softmax(⌊Q / √D⌉ · ⌊K⌉ᵀ), quantized with scale 1 / 448, times ⌊V⌉.

    Args:
        q, k, v: fp32 [batch, heads, tokens, D], after norms and RoPE.
        scales: of `attention_scales`.
        mask: as SDPA has it: what may be read, or what is added to the scores.
    """
    scaled = (q / math.sqrt(q.shape[-1]), k, v)
    q8, k8, v8 = (rounded(t / s.float(), "fp8") * s.float() for t, s in zip(scaled, scales, strict=True))
    scores = q8 @ k8.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = rounded(scores.softmax(-1) * LARGEST["fp8"], "fp8") / LARGEST["fp8"]
    return shares @ v8


_ORDER = ("weight", "weight_scale", "weight_scale_2", "channel_scale", "input_scale", "pre_quant_scale")  # of `stored`


def _quantize_rows(weight: Tensor, scheme: Scheme, compute: torch.dtype) -> dict[str, Tensor]:
    """One scale for the layer, and a factor for every row."""
    sizes, largest = weight.abs().amax(1), LARGEST[scheme.weights]
    common = scale_of(_SHARED_SCALE if scheme.activations == "none" else float(sizes.max()) / largest, compute)
    s_w = common.float()

    def scale(amax: Tensor) -> Tensor:
        factor = torch.where(amax > 0, amax / (largest * s_w), 1.0)  # of a row of zeros it is 1
        return scale_of(factor, compute).float() * s_w

    codes, scales = _searched(weight, scheme, scale)
    # Both products were exact: 22 bits.
    return {"weight": codes, "weight_scale": common, "channel_scale": (scales / s_w).flatten().to(compute)}


def _quantize_blocks(weight: Tensor, scheme: Scheme, compute: torch.dtype) -> dict[str, Tensor]:
    """A scale for every block of a row; of NVFP4 in E4M3 times one number."""
    if weight.shape[1] % (scheme.block or 1):
        raise ValueError(f"{scheme.name} takes blocks of {scheme.block} inputs, not {weight.shape[1]} inputs")
    if scheme.weights == "fp4":
        second = _second_scale(float(weight.abs().max()))
        codes, scales = _searched(weight, scheme, lambda amax: _e4m3_scale(amax / LARGEST["fp4"], second))
        stored = (scales / second).to(torch.float8_e4m3fn)  # to the number that it was made of
        return {"weight": codes, "weight_scale": stored, "weight_scale_2": second}
    codes, scales = _searched(weight, scheme, lambda amax: scale_of(amax / LARGEST["int4"], compute).float())
    return {"weight": codes, "weight_scale": scales.to(compute)}


def _searched(weight: Tensor, scheme: Scheme, scale: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Encoded weights, and what each block or row was divided by: fp32 [out, in / block], or [out, 1].

    Args:
        scale: from the largest magnitude that is to be taken, to what is divided by: a number that can be stored.
    """
    rows, columns = weight.shape
    made = []
    for start in range(0, rows, max(1, _CHUNK // columns)):
        blocks = weight[start : start + max(1, _CHUNK // columns)].unflatten(1, (-1, scheme.block or columns))
        values, scales = _best(blocks, scheme.weights, scale)
        made.append((encode(values.flatten(1), scheme.weights), scales.squeeze(-1)))
    return torch.cat([codes for codes, _ in made]), torch.cat([scales for _, scales in made])


def _best(blocks: Tensor, form: str, scale: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Blocks [..., n] as values of a format, and the scale of each [..., 1]: of all multiples, the best."""
    amax = blocks.abs().amax(-1, keepdim=True)
    first, *others = _MULTIPLES[form]
    values, scales, least = _tried(blocks, form, scale(amax * first))
    for multiple in others:
        candidate, divisor, error = _tried(blocks, form, scale(amax * multiple))
        better = error < least
        values = torch.where(better, candidate, values)
        scales, least = torch.where(better, divisor, scales), torch.where(better, error, least)
    return values, scales


def _tried(blocks: Tensor, form: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = rounded(blocks / scale, form)
    return values, scale, (values * scale - blocks).square_().sum(-1, keepdim=True)


def _e4m3_scale(scale: Tensor, second: Tensor) -> Tensor:
    """A block's scale of NVFP4 as it is computed with, fp32."""
    return rounded(scale / second, "fp8").clamp_(min=LEAST_E4M3) * second


def _second_scale(amax: float) -> Tensor:
    """NVFP4's number for the whole tensor: its largest block has the largest scale that E4M3 holds. fp32 []."""
    return torch.tensor(amax / (LARGEST["fp4"] * LARGEST["fp8"]) if amax > 0 else 1.0)


def _input_scale(amax: float, scheme: Scheme, compute: torch.dtype) -> Tensor:
    if scheme.activations == "block":
        return _second_scale(_HEADROOM * amax)
    return scale_of(amax * (_HEADROOM if scheme.weights == "fp8" else 1) / LARGEST[scheme.weights], compute)


def _nvfp4(x: Tensor, second: Tensor, scheme: Scheme, compute: torch.dtype | None) -> Tensor:
    """An input in blocks of E2M1, whose E4M3 scales are found while running, and applied in the compute type."""
    blocks = x.unflatten(-1, (-1, scheme.block or 1))
    scale = _cast(_e4m3_scale(blocks.abs().amax(-1, keepdim=True) / LARGEST["fp4"], second), compute)
    return (rounded(blocks / scale, "fp4") * scale).flatten(-2)


def _values(tensors: Tensors, scheme: Scheme) -> Tensor:
    """The weights in fp32 [out, in], as the quantized input meets them: smoothing is in them."""
    weight = decode(tensors["weight"], scheme.weights)
    scale = tensors["weight_scale"].float()
    if not scheme.block:
        return weight * (scale * tensors["channel_scale"].float()).unsqueeze(1)
    if scheme.weights == "fp4":
        scale = scale * tensors["weight_scale_2"]
    return (weight.unflatten(1, (-1, scheme.block)) * scale.unsqueeze(-1)).flatten(1)


def _cast(x: Tensor, compute: torch.dtype | None) -> Tensor:
    return x if compute is None else x.to(compute).float()
