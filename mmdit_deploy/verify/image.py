"""How alike two images are: PSNR, SSIM, and LPIPS where the package is installed.

Images are [batch, channels, height, width] fp32, of values from 0 to 1.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit_deploy.errors import UsageError
from mmdit_deploy.verify.metrics import compare
from mmdit_deploy.verify.records import Errors

# A latent [batch, channels, height, width] fp32 → its images [batch, channels, …] fp32, from 0 to 1.
Decoder = Callable[[Tensor], Tensor]
# Of latents as images: VAEs of this kind of model make latents of about unit variance.
LATENT_RANGE = (-4.0, 4.0)
# Wang et al. 2004, section III.C: an 11 × 11 Gaussian window of 1.5 pixels, and the two constants.
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def compare_images(received: Tensor, reference: Tensor) -> Errors:
    """Compare images of equal shape; the figures of `compare`, and those of images."""
    errors = compare(received, reference)
    if errors.nonfinite:
        return replace(errors, psnr=math.nan, ssim=math.nan)
    return replace(
        errors,
        psnr=psnr(received, reference),
        ssim=ssim(received, reference),
        lpips=lpips_distance(received, reference),
    )


def psnr(received: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of values from 0 to 1; infinite for equal images."""
    error = float((received.double() - reference.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(received: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), of values from 0 to 1: its mean over the places of a Gaussian window.

    Of an image that is smaller than the window, the window is the largest odd one that fits.
    """
    side = min(WINDOW, *reference.shape[-2:])
    window = _gaussian(side if side % 2 else side - 1)
    a, b = (t.double().flatten(0, 1).unsqueeze(1) for t in (received, reference))
    mean_a, mean_b = _smooth(a, window), _smooth(b, window)
    variance_a = _smooth(a * a, window) - mean_a**2
    variance_b = _smooth(b * b, window) - mean_b**2
    covariance = _smooth(a * b, window) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variance_a + variance_b + K2**2)
    return float((luminance * structure).mean())


def _gaussian(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64) - size // 2
    weights = (-(places**2) / (2 * SIGMA**2)).exp()
    return weights / weights.sum()


def _smooth(images: Tensor, window: Tensor) -> Tensor:
    """The weighted mean around each place where the whole window lies within: [images, 1, H, W] → [images, 1, …]."""
    return F.conv2d(F.conv2d(images, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def lpips_distance(received: Tensor, reference: Tensor) -> float | None:
    """Learned perceptual distance (Zhang et al. 2018, AlexNet); None of what is not RGB, or where `lpips_missing`."""
    network, _ = _lpips()
    if network is None or reference.shape[1] != 3:
        return None
    with torch.no_grad():
        return float(network(received.float(), reference.float(), normalize=True).mean())


def lpips_missing() -> str | None:
    """Why there is no LPIPS here, in words; None where there is."""
    return _lpips()[1]


@functools.cache
def _lpips() -> tuple[Any, str | None]:
    """The network, once, or why there is none."""
    try:
        import lpips  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None, "the package lpips is not installed"
    try:
        return lpips.LPIPS(net="alex", verbose=False).eval(), None
    except Exception as error:  # it downloads AlexNet's weights the first time, and any way of that may fail
        return None, f"the package lpips cannot load its network: {error}"


def scaled(latent: Tensor) -> Tensor:
    """A latent as an image: `LATENT_RANGE` becomes 0 to 1, and what lies beyond is cut."""
    low, high = LATENT_RANGE
    image = (latent - low) / (high - low)
    return torch.where(image.isfinite(), image.clamp(0, 1), image)  # an Inf is no white pixel


def load_decoder(name: str) -> Decoder:
    """A decoder of the user's own, by ``module:function``.

    Args:
        name: what it names gets latents [batch, channels, height, width] fp32, without any scale or shift of the VAE's
            undone, and gives images [batch, 3, height', width'] of values from 0 to 1.

    Raises:
        UsageError: there is no such module or function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise UsageError(
            "a decoder is module:function, to be imported",
            received=f"{name}: {error}",
            fix="e.g. my_vae:decode, with my_vae.py in PYTHONPATH",
        ) from error
    if not callable(found):
        raise UsageError("a decoder is a function", received=f"{name}: {type(found).__name__}", fix="name a function")

    def decode(latent: Tensor) -> Tensor:
        with torch.no_grad():
            image = found(latent)
        if not isinstance(image, Tensor) or image.ndim != 4 or len(image) != len(latent):
            received = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise UsageError(
                "a decoder gives images [batch, channels, height, width]",
                received=f"{received} from {name}",
                fix="return a tensor like that, of values from 0 to 1",
            )
        return image.float()

    return decode
