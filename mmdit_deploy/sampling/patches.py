"""Latents as tokens and back: patches of p × p are tokens, with channels in channel, row, column order.

    [B, C, rows·p, cols·p]  ◄─►  [B, rows·cols, C·p·p]

A patch is 2 × 2 in SD3, FLUX and Qwen-Image, where the model makes tokens of latents and where the pipeline does.
"""

from __future__ import annotations

from torch import Tensor


def patchify(latent: Tensor, patch: int = 2) -> Tensor:
    """A latent [B, C, rows·p, cols·p] as tokens [B, rows·cols, C·p·p]."""
    patches = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int = 2) -> Tensor:
    """Tokens [B, rows·cols, C·p·p] as a latent [B, C, rows·p, cols·p].

    Args:
        grid: rows and columns.
        patch: a token's side in the latent, p.
    """
    rows, cols = grid
    split = tokens.reshape(len(tokens), rows, cols, -1, patch, patch)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows * patch, cols * patch)
