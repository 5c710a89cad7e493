"""RoPE, as diffusers, transformers, Black Forest Labs and we write it.

Qwen-Image's complex numbers: torch's TorchScript exporter has none, and its dynamo exporter no unsqueeze of them, which
diffusers' code does ("qwen-as-it-is" is exported by nobody, and the generator says so). So "qwen" unsqueezes the angles
before, and dynamo writes pairs of reals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from case import Case
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from mmdit_deploy.model.layers import rotate

_B, _N, _H, _D = 2, 5, 3, 8


class _Function(nn.Module):
    """A function of x and positions, as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.function(x, positions)


def _case(
    name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    heads_last: bool = False,
    half: bool = False,
    axes: int = 2,
    exporters: tuple[str, ...] = ("dynamo", "torchscript"),
    expect: Mapping[str, int] = {"RotaryEmbedding": 1},
) -> Case:
    shape = (_B, _N, _H, _D) if heads_last else (_B, _H, _N, _D)
    x = (torch.arange(_B * _N * _H * _D) % 23 - 11).reshape(shape) / 8
    tokens = 1 if heads_last else 2
    return Case(
        name,
        _Function(function),
        {"x": x.half() if half else x, "positions": torch.arange(_N * axes).reshape(_N, axes) / 3},
        {"x": {0: "batch", tokens: "tokens"}, "positions": {0: "tokens"}},
        expect,
        exporters,
    )


def _angles(positions: Tensor) -> Tensor:
    """[N, axes] → [N, D/2]"""
    frequencies = 1 / 100 ** (torch.arange(0, 4, 2) / 4)
    return (positions[..., None] * frequencies).flatten(-2)


def _flux_angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """FLUX's, at full width: each axis' channels in pairs."""
    waves = [
        get_1d_rotary_pos_embed(
            4, positions[:, i], use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
        )
        for i in range(2)
    ]
    return torch.cat([c for c, _ in waves], -1), torch.cat([s for _, s in waves], -1)


def _halves(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = _angles(positions)
    both = torch.cat([angles, angles], -1)
    return both.cos(), both.sin()


def _flux(x: Tensor, positions: Tensor) -> Tensor:
    return apply_rotary_emb(x, _flux_angles(positions), sequence_dim=1)


def _flux_heads_first(x: Tensor, positions: Tensor) -> Tensor:
    return apply_rotary_emb(x, _flux_angles(positions))


def _flux2(x: Tensor, positions: Tensor) -> Tensor:
    return apply_rotary_emb(x, Flux2PosEmbed(2000, [2, 2, 2, 2])(positions), sequence_dim=1)


def _cogview(x: Tensor, positions: Tensor) -> Tensor:
    return apply_rotary_emb(x, _halves(positions), use_real_unbind_dim=-2)


def _qwen_complex(x: Tensor, positions: Tensor) -> Tensor:
    # As diffusers' but for the place of the unsqueeze, which is exported of real numbers only.
    angles = _angles(positions).unsqueeze(1)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3).type_as(x)


def _qwen_as_it_is(x: Tensor, positions: Tensor) -> Tensor:
    angles = _angles(positions)
    return apply_rotary_emb_qwen(x, torch.polar(torch.ones_like(angles), angles), use_real=False)


def _ours(x: Tensor, positions: Tensor) -> Tensor:
    angles = _angles(positions)
    return rotate(x, angles.cos(), angles.sin())


def _llama(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = _halves(positions)
    return llama_rotary(x, x, cos[None], sin[None])[0]


def _gpt_neox(x: Tensor, positions: Tensor) -> Tensor:
    """Partial: the first four of eight channels."""
    angles = _angles(positions)[..., :2]
    both = torch.cat([angles, angles], -1)
    first, rest = x[..., :4], x[..., 4:]
    return torch.cat([neox_rotary(first, first, both.cos()[None], both.sin()[None])[0], rest], dim=-1)


def _partial_heads_last(x: Tensor, positions: Tensor) -> Tensor:
    angles = _angles(positions)[..., :2]
    first, rest = x.split([4, 4], dim=-1)
    return torch.cat([rotate(first, angles.cos(), angles.sin()), rest], dim=-1)


def _halves_apart(x: Tensor, positions: Tensor) -> Tensor:
    """Each half a sum of its own."""
    cos, sin = _angles(positions).cos(), _angles(positions).sin()
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _matrices(x: Tensor, positions: Tensor) -> Tensor:
    """Black Forest Labs': a rotation matrix per pair."""
    angles = _angles(positions)
    pe = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).unflatten(-1, (2, 2))
    pe = pe.float()[None, None]
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(*x.shape).type_as(x)


def _positions_per_sample(x: Tensor, positions: Tensor) -> Tensor:
    """A table of angles, looked up for each sample."""
    angles = _angles(torch.arange(16, dtype=torch.float32).reshape(8, 2))
    both = torch.cat([angles, angles], -1)
    chosen = positions[:, 0].long().remainder(8).expand(x.shape[0], -1)
    return llama_rotary(x, x, both.cos()[chosen], both.sin()[chosen])[0]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, signs: tuple[int, int] = (-1, 1)) -> Tensor:
    """x·cos + (x, its neighbours swapped)·sin, for near misses."""
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    moved = [-part if sign < 0 else part for part, sign in zip((odd, even), signs, strict=True)]
    return x * cos[:, None] + torch.stack(moved, -1).flatten(-2) * sin[:, None]


def _the_other_way(x: Tensor, positions: Tensor) -> Tensor:
    return _turned(x, *_flux_angles(positions), signs=(1, -1))


def _reflected(x: Tensor, positions: Tensor) -> Tensor:
    return _turned(x, *_flux_angles(positions), signs=(1, 1))


def _halves_for_neighbours(x: Tensor, positions: Tensor) -> Tensor:
    """Cosines of the one kind of pairs, and channels of the other."""
    return _turned(x, *_halves(positions))


def _cos_for_sin_in_one(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = _angles(positions).cos()[:, None], _angles(positions).sin()[:, None]
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * sin + even * cos], dim=-1).flatten(-2)


def _another_tensor(x: Tensor, positions: Tensor) -> Tensor:
    """Q turned into K."""
    cos, sin = _flux_angles(positions)
    even, odd = x.exp().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos[:, None] + torch.stack([-odd, even], -1).flatten(-2) * sin[:, None]


def _by_head(x: Tensor, positions: Tensor) -> Tensor:
    angles = _angles(positions)[:, None] * torch.arange(1, _H + 1)[:, None]
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


_NONE = {"RotaryEmbedding": 0}

CASES = (
    _case("flux", _flux, heads_last=True),
    _case("flux-fp16", _flux, heads_last=True, half=True),
    _case("flux-heads-first", _flux_heads_first, exporters=("dynamo",)),
    _case("flux2", _flux2, heads_last=True, axes=4),
    _case("cogview", _cogview),
    _case("qwen", _qwen_complex, heads_last=True, exporters=("dynamo",)),
    _case("qwen-fp16", _qwen_complex, heads_last=True, half=True, exporters=("dynamo",)),
    _case("qwen-as-it-is", _qwen_as_it_is, heads_last=True, exporters=("dynamo",)),
    _case("ours", _ours, heads_last=True),
    _case("ours-fp16", _ours, heads_last=True, half=True),
    _case("llama", _llama),
    _case("llama-table", _positions_per_sample),
    _case("gpt-neox", _gpt_neox),
    _case("partial-heads-last", _partial_heads_last, heads_last=True),
    _case("halves-apart", _halves_apart),
    _case("matrices", _matrices),
    _case("near-miss-the-other-way", _the_other_way, heads_last=True, exporters=("dynamo",), expect=_NONE),
    _case("near-miss-reflected", _reflected, heads_last=True, exporters=("dynamo",), expect=_NONE),
    _case(
        "near-miss-halves-for-neighbours", _halves_for_neighbours, heads_last=True, exporters=("dynamo",), expect=_NONE
    ),
    _case("near-miss-cos-for-sin-in-one", _cos_for_sin_in_one, heads_last=True, exporters=("dynamo",), expect=_NONE),
    _case("near-miss-another-tensor", _another_tensor, heads_last=True, exporters=("dynamo",), expect=_NONE),
    _case("near-miss-by-head", _by_head, heads_last=True, exporters=("dynamo",), expect=_NONE),
)
