"""Random weights are the same to the bit, whatever the machine, the order and the number of threads."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from mmdit_deploy.checkpoint import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.random_source import _CHUNK_VALUES, _THREAD_FROM

# The bits of the first fp32 values at std 1. A change of generator changes every random bundle that exists.
PINNED = {
    (0, "a.weight"): [0xBFB298F2, 0x3F963A75, 0xBEF48B3E, 0xBFC6FD58, 0x3EDFD72B, 0x3EF0595F],
    (1, "a.weight"): [0xBF4DAAE1, 0xBF4B98DF, 0xBFDD1107, 0xBFD3851A, 0x3F79C463, 0x3F1432D7],
    (0, "transformer_blocks.23.attn.to_q.weight"): [
        *(0x3EFACBA8, 0x3FDCCD7A, 0xBF346767, 0xBF8A2BF1, 0x3F804438, 0x3FC94350),
    ],
}
# SHA-256 of 3,000,001 values (many chunks, an odd rest) at std 0.02 and mean 1
PINNED_DIGESTS = {
    torch.float32: "d09664564eee847af1111519ebdbda7ed7222848d3536d7991549c5b0fb26f0f",
    torch.float16: "d2d4c61f2743e8f56b0a29f3b8e52fe5283ca0d0eb9a392eb7582e2c6776e32b",
    torch.bfloat16: "d5d8b3563f8abb9e1b46ae04921d8b7c48d57897a6a08d0ee3b6f6f03667123a",
}


def bits(tensor: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in tensor.view(torch.int32).tolist()]


@pytest.mark.parametrize(("seed", "key"), PINNED)
def test_first_values_are_pinned(seed: int, key: str) -> None:
    assert bits(random_tensor(seed, key, (6,), std=1.0)) == PINNED[seed, key]
    assert bits(random_tensor(seed, key, (2, 3), std=1.0).reshape(-1)) == PINNED[seed, key]


@pytest.mark.parametrize("dtype", PINNED_DIGESTS)
@pytest.mark.parametrize("threads", [1, 2, 3, None])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, threads: int | None) -> None:
    assert _THREAD_FROM < 3_000_001
    tensor = random_tensor(7, "big", (3_000_001,), std=0.02, mean=1.0, dtype=dtype, threads=threads)
    assert hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest() == PINNED_DIGESTS[dtype]


def test_values_are_the_raw_words_of_philox() -> None:
    """Written out plainly, without chunks: what another program has to do to get the same weights."""
    count = 2 * _CHUNK_VALUES + 5
    digest = hashlib.sha256(b"mmdit-deploy random weights 1\0" + b"3" + b"\0" + b"some.key").digest()
    key = np.array([int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(-(-count // 4))
    integers = np.frombuffer(words.astype("<u8").tobytes(), dtype="<i2")[:count]
    expected = integers.astype(np.float32) * np.float32(math.sqrt(3) * 0.5 / 32768) + np.float32(0.25)
    tensor = random_tensor(3, "some.key", (count,), std=0.5, mean=0.25)
    assert np.array_equal(tensor.numpy(), expected)


def test_a_16_bit_weight_is_the_rounded_fp32_one() -> None:
    reference = random_tensor(0, "w", (1000,), std=0.02)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(random_tensor(0, "w", (1000,), std=0.02, dtype=dtype), reference.to(dtype))


def test_statistics() -> None:
    tensor = random_tensor(0, "w", (1000, 1000), std=0.3, mean=1.0).double()
    assert tensor.mean() == pytest.approx(1.0, abs=2e-3) and tensor.std() == pytest.approx(0.3, rel=5e-3)
    assert (tensor - 1).abs().max() <= 0.3 * math.sqrt(3) * (1 + 1e-6)
    other = random_tensor(0, "v", (1000, 1000), std=0.3, mean=1.0).double()
    assert abs(torch.corrcoef(torch.stack([tensor.flatten(), other.flatten()]))[0, 1]) < 5e-3


def test_empty_and_scalar() -> None:
    assert random_tensor(0, "w", (0, 3), std=1.0).shape == (0, 3)
    assert bits(random_tensor(0, "a.weight", (), std=1.0).reshape(1)) == PINNED[0, "a.weight"][:1]


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("pos_embed.proj.weight", (64, 16, 2, 2), (0.0, 1 / 8)),
        ("pos_embed.proj.bias", (64,), (0.0, 0.02)),
        ("transformer_blocks.3.attn.to_q.weight", (64, 100), (0.0, 0.1)),
        ("transformer_blocks.3.attn.to_out.0.bias", (64,), (0.0, 0.02)),
        ("transformer_blocks.3.norm1.linear.weight", (384, 100), (0.0, 0.03)),
        ("transformer_blocks.3.norm1_context.linear.weight", (384, 100), (0.0, 0.03)),
        ("norm_out.linear.weight", (128, 100), (0.0, 0.03)),
        ("norm_out.linear.bias", (128,), (0.0, 0.1)),
        ("transformer_blocks.3.norm1.linear.bias", (384,), (0.0, 0.1)),
        ("transformer_blocks.3.attn.norm_q.weight", (16,), (1.0, 0.1)),
        ("transformer_blocks.3.attn2.norm_k.weight", (16,), (1.0, 0.1)),
        ("transformer_blocks.3.attn.norm_added_k.weight", (16,), (1.0, 0.1)),
        # FLUX.1, FLUX.2, Qwen-Image
        ("single_transformer_blocks.3.norm.linear.weight", (192, 100), (0.0, 0.03)),
        ("single_transformer_blocks.3.norm.linear.bias", (192,), (0.0, 0.1)),
        ("single_transformer_blocks.3.attn.norm_k.weight", (16,), (1.0, 0.1)),
        ("single_transformer_blocks.3.proj_out.weight", (64, 100), (0.0, 0.1)),
        ("double_stream_modulation_txt.linear.weight", (384, 100), (0.0, 0.03)),
        ("single_stream_modulation.linear.weight", (192, 100), (0.0, 0.03)),
        ("transformer_blocks.3.img_mod.1.weight", (384, 100), (0.0, 0.03)),
        ("transformer_blocks.3.txt_mod.1.bias", (384,), (0.0, 0.1)),
        ("txt_norm.weight", (16,), (1.0, 0.1)),
    ],
)
def test_weight_statistics(key: str, shape: tuple[int, ...], expected: tuple[float, float]) -> None:
    assert weight_statistics(key, shape) == pytest.approx(expected)


def test_the_position_table_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="computed"):
        weight_statistics("pos_embed.pos_embed", (1, 64, 16))
