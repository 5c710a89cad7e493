"""scikit-learn's 8×8 digits, which ship inside its package: one half to train the model on, one to train its judge.

    1797 images ─┬─ odd ones  ─► the model, with the words that fit each image ("a bold seven")
                 └─ even ones ─► the judge: a support vector classifier, and how much ink each digit usually has

The judge has never seen an image that the model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from digits_prompts import NUMBERS, WEIGHTS
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

SIDE = 8
FULL = 16.0  # a pixel's most ink
TERTILES = (1 / 3, 2 / 3)


@dataclass(frozen=True)
class Digits:
    """Some of the images.

    Args:
        images: ink of each pixel, [B, 64], 0 to 16, row by row.
        digits: what they show, [B].
    """

    images: np.ndarray
    digits: np.ndarray

    @property
    def weights(self) -> list[str | None]:
        """The third of each digit with the least ink is thin, the third with the most is bold."""
        ink, words = self.images.mean(axis=1), np.full(len(self.digits), None, dtype=object)
        for digit in range(len(NUMBERS)):
            (of_digit,) = np.nonzero(self.digits == digit)
            low, high = np.quantile(ink[of_digit], TERTILES)
            words[of_digit[ink[of_digit] <= low]], words[of_digit[ink[of_digit] >= high]] = WEIGHTS
        return list(words)


@cache
def halves() -> tuple[Digits, Digits]:
    """What the model is trained on, and what the judge is."""
    images, digits = load_digits(return_X_y=True)
    return tuple(Digits(images[i::2], digits[i::2]) for i in (1, 0))  # type: ignore[return-value]


def to_latent(images: np.ndarray) -> Tensor:
    """Ink 0 to 16 as the model has it, -1 to 1: [B, 64] → tokens [B, 64, 1] fp32."""
    return torch.from_numpy(images / (FULL / 2) - 1).to(torch.float32)[..., None]


def to_images(latent: Tensor) -> np.ndarray:
    """The inverse of `to_latent`, in the data's own whole numbers."""
    ink: np.ndarray = ((latent[..., 0].double().numpy() + 1) * (FULL / 2)).clip(0, FULL).round()
    return ink


class Judge:
    """Says which digit an image shows, and whether it has more or less ink than that digit usually has."""

    def __init__(self) -> None:
        _, known = halves()
        self.classifier = SVC(C=10, gamma=0.001).fit(known.images, known.digits)
        ink = known.images.mean(axis=1)
        self.usual_ink = np.array([np.median(ink[known.digits == digit]) for digit in range(len(NUMBERS))])

    def shows(self, images: np.ndarray) -> np.ndarray:
        """The digit that each image shows, [B]."""
        return np.asarray(self.classifier.predict(images))

    def has_weight(self, images: np.ndarray, digits: np.ndarray, weight: str) -> np.ndarray:
        """Whether each image is bold, or thin, as asked: [B] bool."""
        more = images.mean(axis=1) > self.usual_ink[digits]
        return more if weight == "bold" else ~more
