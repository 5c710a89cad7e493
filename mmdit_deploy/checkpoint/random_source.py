"""Random weights from integers: the same to the bit on any machine, in any order, with any number of threads.

`torch.randn` differs between CPUs in the last bits, so it cannot stand for weights that two machines must
agree on. Here a counter generator (Philox 4x64, keyed by the SHA-256 of seed and tensor name) gives 16-bit
integers, and three IEEE operations that every machine rounds alike make them uniform floats: times a scale,
plus a mean, to the dtype.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mmdit_deploy.families import FAMILIES

_STREAM = "mmdit-deploy random weights 1"  # change it, and every random bundle changes
_CHUNK_WORDS = 2**15  # 256 KiB of 64-bit words, 512 KiB as fp32: stays in the L2 cache
_PER_WORD = 4  # 16-bit values in a 64-bit word
_CHUNK_VALUES = _CHUNK_WORDS * _PER_WORD
_WORDS_PER_COUNT = 4  # Philox 4x64 makes four words from one counter value
_THREAD_FROM = 16 * _CHUNK_VALUES  # smaller tensors are done before a thread has started


def _keys_of(paths: str) -> re.Pattern[str]:
    """Weights and biases of all families' modules whose path in our model is of a pattern."""
    chosen = (keys for family in FAMILIES.values() for keys in family.keys if re.search(paths, keys.path))
    modules = {re.escape(module).replace(r"\*", "[0-9]+") for keys in chosen for module in keys.diffusers}
    return re.compile(rf"(?:{'|'.join(sorted(modules))})\.(?:weight|bias)")


_MODULATION = _keys_of(r"^\w*modulations?\.")
_NORM = _keys_of(r"\.norm(?:_[qk])?$")


def weight_statistics(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a random weight, such that no part of the model is idle.

    Modulation is not small: with AdaLN-Zero's own initialization every block is the identity, and parity on
    such weights proves nothing. Weights of norms differ by channel, so that a swapped one is seen.

    Args:
        key: canonical key (diffusers' name).
        shape: of the weight; [out, in, …] for linear layers and convolutions.

    Returns:
        (mean, standard deviation).

    Raises:
        ValueError: for the table of position embeddings, which is computed and not drawn.
    """
    if key.endswith("pos_embed.pos_embed"):
        raise ValueError(f"{key} is a computed table, not a random weight")
    if _NORM.fullmatch(key):
        return 1.0, 0.1
    modulation = _MODULATION.fullmatch(key) is not None
    if len(shape) < 2:
        return 0.0, 0.1 if modulation else 0.02
    fan_in = math.prod(shape[1:])
    return 0.0, (0.3 if modulation else 1.0) / math.sqrt(fan_in)


def _philox_key(seed: int, key: str) -> np.ndarray:
    """128 bits for Philox from seed and name."""
    digest = hashlib.sha256(f"{_STREAM}\0{seed}\0{key}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def random_tensor(
    seed: int,
    key: str,
    shape: tuple[int, ...],
    *,
    std: float,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
) -> torch.Tensor:
    """Draws one tensor, uniform in mean ± √3·std in 65,536 steps.

    Args:
        seed: of the whole model.
        key: of the tensor; tensors of different keys are independent.
        shape: of the result.
        std: standard deviation.
        mean: of the distribution.
        dtype: a float dtype. Values are made in fp32; 16-bit weights are these, rounded once.
        threads: how many draw at once; None takes what the machine has, at most 4. The bits stay the same.

    Returns:
        A contiguous tensor on the CPU.
    """
    total = math.prod(shape)
    out = torch.empty(total, dtype=dtype)
    philox_key = _philox_key(seed, key)
    scale = np.float32(math.sqrt(3.0) * std / 32768.0)
    shift = np.float32(mean)

    def fill(chunks: range) -> None:
        values = np.empty(_CHUNK_VALUES, dtype=np.float32)
        for chunk in chunks:
            start = chunk * _CHUNK_VALUES
            count = min(_CHUNK_VALUES, total - start)
            counter = chunk * (_CHUNK_WORDS // _WORDS_PER_COUNT)
            generator = np.random.Generator(np.random.Philox(key=philox_key, counter=counter))
            # All 64-bit integers: the very words of `random_raw` (a test says so), 6 times as fast
            words = generator.integers(0, 2**64, size=-(-count // _PER_WORD), dtype=np.uint64)
            integers = words.astype("<u8", copy=False).view("<i2")[:count]
            np.multiply(integers, scale, out=values[:count])
            if mean:
                np.add(values[:count], shift, out=values[:count])
            out[start : start + count] = torch.from_numpy(values[:count])

    chunk_count = -(-total // _CHUNK_VALUES)
    workers = 1 if total < _THREAD_FROM else threads or min(4, os.cpu_count() or 1)
    if workers == 1:
        fill(range(chunk_count))
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, [range(first, chunk_count, workers) for first in range(workers)]))
    return out.reshape(shape)
