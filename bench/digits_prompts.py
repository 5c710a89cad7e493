"""Prompts in words for the digits model, and the small fixed text embedding that it was trained with.

    "a bold seven" ─► a | bold | seven | · ─► one vector per word and place: tokens [4, 64]
                                          └─► their mean without places:      pooled [64]

Nothing is learned here. Each word has a random vector, made from integers by its name, and each place has another: the
same to the bit on every machine. No prompt at all is four empty words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "bold")
EMPTY = "·"
WORDS = (EMPTY, "a", *WEIGHTS, *NUMBERS)
TOKENS, WIDTH = 4, 64
NO_PROMPT = ""
_SEED = 20  # change it, and the checkpoint means nothing


def prompt(digit: int, weight: str | None = None) -> str:
    """``prompt(7, "bold")`` is "a bold seven"."""
    return " ".join(["a", *([weight] if weight else []), NUMBERS[digit]])


@cache
def _vector(name: str) -> Tensor:
    return random_tensor(_SEED, name, (WIDTH,), std=1.0)


def embed(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the model reads of prompts.

    Returns:
        `encoder_hidden_states` [B, TOKENS, WIDTH] and `pooled_projections` [B, WIDTH], both fp32.

    Raises:
        ValueError: a prompt has a word that has no vector, or too many words.
    """
    tokens, pooled = [], []
    for text in prompts:
        words = text.split()
        if len(words) > TOKENS or not set(words) <= set(WORDS):
            raise ValueError(f"a prompt has at most {TOKENS} of the words {', '.join(WORDS[1:])}: {text!r}")
        words += [EMPTY] * (TOKENS - len(words))
        vectors = [_vector(word) for word in words]
        tokens.append(torch.stack([v + 0.5 * _vector(f"place {i}") for i, v in enumerate(vectors)]))
        pooled.append(((vectors[0] + vectors[1]) + (vectors[2] + vectors[3])) / 2)  # of std 1, as the tokens
    return torch.stack(tokens), torch.stack(pooled)
