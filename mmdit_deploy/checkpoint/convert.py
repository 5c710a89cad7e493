"""Conversion between 32- and 16-bit floats that refuses to make or to pass on a NaN or an infinity.

The check and the conversion share one pass over memory, in chunks that stay in the cache. The check needs no
mask: the bits of a float without the sign, read as an integer, are ordered like its absolute value, with NaN
and infinity on top. So one integer maximum finds the largest magnitude and everything that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import CheckpointError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_UNSIGNED = {torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}
_SIGNED = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_CHUNK_ELEMENTS = 2**18  # at most 1 MiB: source, scratch and result of a chunk fit into a core's L2 cache


def _chunks(flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        yield start, flat[start : start + _CHUNK_ELEMENTS]


def _max_abs(chunk: torch.Tensor, scratch: np.ndarray) -> torch.Tensor:
    """The largest magnitude of a contiguous chunk, as a scalar of its dtype; NaN ranks above infinity."""
    bits = chunk.view(_SIGNED[chunk.dtype]).numpy().view(_UNSIGNED[chunk.dtype])
    shifted = np.left_shift(bits, 1, out=scratch[: bits.size])  # drops the sign
    magnitude = np.array([shifted.max() >> 1], dtype=_UNSIGNED[chunk.dtype])
    return torch.from_numpy(magnitude.view(f"i{chunk.dtype.itemsize}")).view(chunk.dtype)[0]


def _not_finite(flat: torch.Tensor, key: str) -> CheckpointError:
    """Counts what is not finite; slow, but only on the way out."""
    nans = sum(int(chunk.isnan().sum()) for _, chunk in _chunks(flat))
    infs = sum(int(chunk.isinf().sum()) for _, chunk in _chunks(flat))
    return CheckpointError(
        f"tensor {quote(key)} must hold finite numbers only",
        received=f"{nans} NaN and {infs} Inf among {flat.numel()} values of {flat.dtype}",
        fix="get the checkpoint again; if it is as published, it was broken when it was saved",
    )


def convert(tensor: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """Converts a weight to another float dtype, rounding to nearest, and checks that every value stays
    finite.

    Args:
        tensor: the weight, of any shape, on the CPU, in fp32, fp16 or bf16.
        dtype: fp32, fp16 or bf16.
        key: its name, for messages.

    Returns:
        The very same tensor if it has the dtype already, else a new contiguous one.

    Raises:
        CheckpointError: if the tensor is of another dtype, holds NaN or Inf, or has a value beyond the range
            of `dtype`.
        ValueError: if `dtype` is none of the three.
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"convert to one of {FLOAT_DTYPES}, not to {dtype}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"tensor {quote(key)} must be stored in fp32, fp16 or bf16",
            received=f"{tensor.dtype}",
            fix="save the checkpoint in one of these dtypes",
        )
    flat = tensor.detach().contiguous().reshape(-1)
    same = tensor.dtype == dtype
    out = flat if same else torch.empty(flat.shape, dtype=dtype)
    scratch = np.empty(min(flat.numel(), _CHUNK_ELEMENTS), dtype=_UNSIGNED[tensor.dtype])
    for start, chunk in _chunks(flat):
        peak = _max_abs(chunk, scratch)
        if not peak.isfinite():
            raise _not_finite(flat, key)
        if same:
            continue
        if not peak.to(dtype).isfinite():
            peaks = [float(_max_abs(part, scratch)) for _, part in _chunks(flat)]
            if not np.isfinite(peaks).all():  # a later chunk may be worse than an overflow
                raise _not_finite(flat, key)
            raise CheckpointError(
                f"tensor {quote(key)} must fit into {dtype}: at most {torch.finfo(dtype).max:g}",
                received=f"a largest magnitude of {max(peaks):g}",
                fix="use --bf16 or --fp32" if dtype == torch.float16 else "use --fp32",
            )
        out[start : start + _CHUNK_ELEMENTS].copy_(chunk)
    return tensor if same else out.reshape(tensor.shape)
