"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers of an input's channels go over into the weights.

    y = x · Wᵀ = (x · p) · (W / p)ᵀ        p_j = 1 / s_j,  s_j = max|x_j|^α / max|W_j|^(1-α)

A token's scale is then no longer that of its one largest channel. p is divided by its geometric mean, which changes
nothing but keeps x · p as large as x.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST, _MOST = 2.0**-14, 2.0**14  # normal numbers of fp16


def smoothing_factors(input_channels: Tensor, weight_channels: Tensor, alpha: float = 0.5) -> Tensor:
    """What the input is multiplied by, per channel; its weights are divided by it.

    A channel that is always zero, or has weights of zero, is left as it is.

    Args:
        input_channels: the largest magnitude of each channel of the input, fp32 [in].
        weight_channels: that of its weights, fp32 [in].
        alpha: how much of the range goes over: 0 none of the input's, 1 all of it.

    Returns:
        p, fp32 [in]. Values that fp16 and bf16 both have, so that no rounding comes between input and weights.
    """
    inputs, weights = input_channels.double(), weight_channels.double()
    used = (inputs > 0) & (weights > 0)
    logs = (1 - alpha) * weights[used].log() - alpha * inputs[used].log()
    factors = torch.ones_like(inputs)
    if used.any():
        factors[used] = (logs - logs.mean()).exp().clamp(_LEAST, _MOST)
    return factors.to(torch.bfloat16).float()
