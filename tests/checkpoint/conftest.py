"""What tests of checkpoints share: the bench's maker of checkpoints, and random tiny models of every family."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """`bench/make_checkpoint.py`."""
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("make_checkpoint", BENCH / "make_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCH))  # it imports the file beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


@pytest.fixture(scope="session")
def random_config() -> Callable[[str, int], dict[str, Any]]:
    """A tiny config of one diffusers class, its sizes and its options drawn with a seed; no two sizes are tied."""

    def draw(class_name: str, seed: int) -> dict[str, Any]:
        rng = random.Random(f"{class_name} {seed}")
        heads, head_dim = rng.choice([1, 2, 3]), rng.choice([16, 32, 64])
        config: dict[str, Any] = {
            "_class_name": class_name,
            "num_layers": rng.randint(1, 4),
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "joint_attention_dim": 8 * rng.randint(2, 6),
            "in_channels": 4 * rng.randint(1, 6),
        }
        if class_name == "SD3Transformer2DModel":
            dual = tuple(i for i in range(config["num_layers"]) if rng.random() < 0.5)
            qk_norm = "rms_norm" if head_dim < 64 else None  # without it, tensors do not tell a head's width: 64
            config |= {
                "patch_size": rng.choice([1, 2, 2]),
                "sample_size": 16,
                "out_channels": 4 * rng.randint(1, 4),
                "pooled_projection_dim": 8 * rng.randint(2, 6),
                "caption_projection_dim": heads * head_dim,
                "pos_embed_max_size": rng.choice([8, 12]),
                "qk_norm": qk_norm,
                "dual_attention_layers": dual,
            }
        elif class_name == "QwenImageTransformer2DModel":
            config |= {"out_channels": rng.randint(1, 4), "axes_dims_rope": (4, head_dim // 2 - 2, head_dim // 2 - 2)}
        else:
            config |= {"num_single_layers": rng.choice([1, 2]), "guidance_embeds": rng.random() < 0.5}
            if class_name == "FluxTransformer2DModel":
                config["pooled_projection_dim"] = 8 * rng.randint(2, 6)
                config["axes_dims_rope"] = (4, head_dim // 2 - 2, head_dim // 2 - 2)
            else:
                config |= {"mlp_ratio": rng.choice([2.0, 3.0]), "axes_dims_rope": (head_dim // 4,) * 4}
        return config

    return draw


@pytest.fixture(scope="session")
def random_bits() -> Callable[[tuple[int, ...], torch.dtype, int], torch.Tensor]:
    """A tensor of any bits, NaN and infinities among them, so that whatever computes with it is found out."""

    def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        count = torch.Size(shape).numel() * dtype.itemsize
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)

    return draw
