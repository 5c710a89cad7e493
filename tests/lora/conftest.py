"""Tiny models of every family as diffusers has them, and LoRA files for them.

The judges are `peft` and diffusers: their merged state dicts, under the very keys that ours has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.keys import Part, parameters
from mmdit_deploy.families import spec_from_config
from mmdit_deploy.lora import LoraWeights, open_lora
from mmdit_deploy.spec import ModelSpec

TOLERANCE = 1e-6  # relative L2, of the merged tensor
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 20,
            "out_channels": 4,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
    ),
    "flux1": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
}


class StateWeights:
    """A state dict as a source."""

    description = "a state dict"

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def part(self, part: Part) -> Tensor:
        return self.state[part.key]


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family."""

    family: str
    model: Any
    spec: ModelSpec

    @property
    def parts(self) -> list[Part]:
        return [part for parameter in parameters(self.spec) for part in parameter.parts]

    @property
    def source(self) -> StateWeights:
        return StateWeights(self.model.state_dict())

    def copy(self) -> Any:
        """diffusers' model, to be changed."""
        return copy.deepcopy(self.model)

    def shape(self, module: str) -> tuple[int, ...]:
        return tuple(self.model.state_dict()[f"{module}.weight"].shape)

    def modules(self, *ends: str) -> list[str]:
        """Modules whose names end so, after a dot."""
        weights = [key.removesuffix(".weight") for key in self.model.state_dict() if key.endswith(".weight")]
        return [name for name in weights if f".{name}".endswith(tuple(f".{end}" for end in ends))]

    def merged(self, *loras: tuple[Path, float]) -> dict[str, Tensor]:
        """Our merged weights."""
        ours = LoraWeights(self.source, [open_lora(path, self.spec, scale) for path, scale in loras])
        return {part.key: ours.part(part) for part in self.parts}

    def agree(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], touched: Iterable[str]) -> None:
        """Check that merged weights agree, and that just the keys in `touched` were changed, visibly."""
        base, changed = self.model.state_dict(), set(touched)
        for key, tensor in ours.items():
            moved = (theirs[key] - base[key]).norm() / base[key].norm().clamp_min(1e-3)
            if key in changed:
                assert moved > 1e-2, f"{key}: the judge's merge is too small to be judged by"
                error = float((tensor - theirs[key]).norm() / theirs[key].norm())
                assert error <= TOLERANCE, f"{key}: {error:.1e}"
            else:
                assert moved == 0 and tensor.data_ptr() == base[key].data_ptr(), key


def made_up(key: str, *shape: int) -> Tensor:
    """A factor that is the same on any machine."""
    return random_tensor(3, key, shape, std=0.3)


def pair(name: str, out: int, inner: int, rank: int, down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    """Both factors of a module."""
    return {
        f"{name}.{down}.weight": made_up(f"{name} A", rank, inner),
        f"{name}.{up}.weight": made_up(f"{name} B", out, rank),
    }


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., dict[str, Tensor]]:
    """``make_pair(name, out, in, rank, down="lora_A", up="lora_B")`` gives both factors by key."""
    return pair


@pytest.fixture(scope="session")
def make_factor() -> Callable[..., Tensor]:
    """``make_factor(key, *shape)`` gives one factor."""
    return made_up


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Tiny]:
    """The tiny model of a family; not to be changed."""
    diffusers = pytest.importorskip("diffusers")
    made: dict[str, Tiny] = {}

    def make(family: str) -> Tiny:
        if family not in made:
            class_name, config = CONFIGS[family]
            model = getattr(diffusers, class_name)(**config).eval().requires_grad_(False)
            for key, tensor in model.state_dict().items():
                if key != "pos_embed.pos_embed":
                    std = 0.1 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
                    tensor.copy_(random_tensor(5, key, tuple(tensor.shape), std=std))
            fields = {**model.config, "_class_name": class_name}
            made[family] = Tiny(family, model, spec_from_config(fields, f"tiny-{family}"))
        return made[family]

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA file: ``write(tensors, name="lora", metadata={})``."""

    def call(tensors: Mapping[str, Tensor], name: str = "lora", metadata: dict[str, str] | None = None) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return path

    return call
