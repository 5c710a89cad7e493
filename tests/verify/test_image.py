"""PSNR, SSIM and LPIPS of images, judged by scikit-image where it is installed, and latents as images."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmdit_deploy.errors import UsageError
from mmdit_deploy.verify import image
from mmdit_deploy.verify.image import compare_images, load_decoder, psnr, scaled, ssim


def pair(shape: tuple[int, ...], noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """A picture with structure, and the same with noise; from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = (torch.arange(n, dtype=torch.float32) for n in shape[-2:])
    clean = (0.5 + 0.25 * torch.sin(rows / 3)[:, None] + 0.25 * torch.cos(cols / 5)).expand(shape)
    noisy = clean + noise * torch.randn(shape, generator=generator)
    return noisy.clamp(0, 1), clean.clamp(0, 1)


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (2, 1, 11, 64), (1, 16, 24, 24)])
def test_figures_are_those_of_scikit_image(shape: tuple[int, ...]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    received, reference = pair(shape)
    a, b = received.double().numpy(), reference.double().numpy()
    assert psnr(received, reference) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=1.0))
    each = [
        metrics.structural_similarity(
            x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(received, reference) == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_known_values() -> None:
    """Of constants, SSIM is its luminance term; PSNR is -20 lg of the difference."""
    dark, light = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.3)
    assert psnr(dark, light) == pytest.approx(20.0, abs=1e-4)
    assert ssim(dark, light) == pytest.approx((2 * 0.06 + 1e-4) / (0.04 + 0.09 + 1e-4), rel=1e-5)


def test_equal_images_are_equal() -> None:
    _, reference = pair((1, 3, 16, 16))
    errors = compare_images(reference, reference)
    assert errors.psnr == math.inf and errors.ssim == pytest.approx(1.0) and errors.rel_l2 == 0.0


def test_more_noise_is_worse_at_any_size() -> None:
    for shape in ((1, 1, 8, 8), (1, 3, 33, 20), (1, 1, 1, 5)):  # digits have 8 × 8 pixels: less than the window
        little, much = (compare_images(*pair(shape, noise)) for noise in (0.02, 0.2))
        assert little.psnr is not None and much.psnr is not None and little.psnr > much.psnr + 10
        assert little.ssim is not None and much.ssim is not None and little.ssim >= much.ssim


def test_an_image_with_nan_has_no_figures() -> None:
    received, reference = pair((1, 1, 16, 16))
    received[0, 0, 3, 3] = math.nan
    errors = compare_images(received, reference)
    assert errors.nonfinite == 1 and errors.psnr is not None and math.isnan(errors.psnr)


@pytest.fixture
def fresh_lpips() -> Iterator[None]:
    image._lpips.cache_clear()
    yield
    image._lpips.cache_clear()


@pytest.mark.usefixtures("fresh_lpips")
def test_lpips_is_measured_of_rgb_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def __init__(self, net: str, verbose: bool) -> None:
            assert net == "alex"

        def eval(self) -> Network:
            return self

        def __call__(self, a: Tensor, b: Tensor, normalize: bool) -> Tensor:
            assert normalize  # images from 0 to 1, not from -1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    received, reference = pair((2, 3, 16, 16))
    assert compare_images(received, reference).lpips == pytest.approx(float((received - reference).abs().mean()))
    assert compare_images(received[:, :1], reference[:, :1]).lpips is None
    assert image.lpips_missing() is None


@pytest.mark.usefixtures("fresh_lpips")
def test_without_lpips_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert compare_images(*pair((1, 3, 16, 16))).lpips is None
    assert image.lpips_missing() == "the package lpips is not installed"


@pytest.mark.usefixtures("fresh_lpips")
def test_an_lpips_that_cannot_load_its_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    assert compare_images(*pair((1, 3, 16, 16))).lpips is None
    assert "no route to host" in str(image.lpips_missing())


def test_a_latent_is_scaled_to_an_image() -> None:
    latent = torch.tensor([-5.0, -4.0, 0.0, 4.0, math.inf])
    assert scaled(latent).tolist() == [0.0, 0.0, 0.5, 1.0, math.inf]


def test_a_users_decoder_is_named_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(decode=lambda x: x[:, :3] * 0.5, flat=lambda x: x.flatten(), number=3)
    monkeypatch.setitem(sys.modules, "my_vae", module)
    latent = torch.ones(1, 4, 2, 2)
    assert torch.equal(load_decoder("my_vae:decode")(latent), torch.full((1, 3, 2, 2), 0.5))
    for name in ("my_vae", "my_vae:", "my_vae:missing", "my_vae:number", "no_such_module:decode", ":decode"):
        with pytest.raises(UsageError):
            load_decoder(name)
    with pytest.raises(UsageError, match="gives images"):
        load_decoder("my_vae:flat")(latent)
