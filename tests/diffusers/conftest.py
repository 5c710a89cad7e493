"""Pipelines of tiny random components, and tiny transformers with their bundles, exported once a process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.weights import open_weights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.families import POSITION_TABLE
from mmdit_deploy.spec import PRECISIONS, ModelSpec

RANGES = {"batch": Range(1, 2, 6), "img_tokens": Range(1, 64, 512), "txt_tokens": Range(1, 8, 64)}
TEXT, POOLED = 24, 20  # widths
_SMALL = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": TEXT}
_SD3 = {
    **_SMALL,
    "sample_size": 8,
    "in_channels": 16,  # what StableDiffusion3InpaintPipeline takes
    "out_channels": 16,
    "caption_projection_dim": 64,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 72,
    "qk_norm": "rms_norm",
    "num_layers": 2,
}
_FLUX1 = {
    **_SMALL,
    "in_channels": 16,  # of latents with 4 channels, packed
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
    "num_layers": 1,
    "num_single_layers": 2,
}
_FLUX2 = {**_SMALL, "in_channels": 16, "axes_dims_rope": (8, 8, 8, 8), "num_layers": 1, "num_single_layers": 2}
_QWEN = {**_SMALL, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (4, 14, 14), "num_layers": 1}
# Class, config, and what is exported besides.
MODELS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd3": ("SD3Transformer2DModel", _SD3, {}),
    "sd3-controlnet": ("SD3Transformer2DModel", _SD3, {"residuals": 1}),
    "sd3-split": ("SD3Transformer2DModel", _SD3, {"split_conditioning": True}),
    "flux1": ("FluxTransformer2DModel", _FLUX1, {}),
    "flux1-schnell": ("FluxTransformer2DModel", {**_FLUX1, "guidance_embeds": False}, {}),
    "flux1-control": ("FluxTransformer2DModel", {**_FLUX1, "in_channels": 32, "out_channels": 16}, {}),
    "flux1-fill": ("FluxTransformer2DModel", {**_FLUX1, "in_channels": 48, "out_channels": 16}, {}),
    "flux2": ("Flux2Transformer2DModel", _FLUX2, {}),
    "flux2-klein": ("Flux2Transformer2DModel", {**_FLUX2, "guidance_embeds": False}, {}),
    "qwen-image": ("QwenImageTransformer2DModel", _QWEN, {}),
    "qwen-image-edit-2511": ("QwenImageTransformer2DModel", {**_QWEN, "zero_cond_t": True}, {}),
}


@dataclass(frozen=True)
class Tiny:
    """A tiny transformer of diffusers, and the same as a bundle for ort-cpu."""

    name: str
    original: Any
    spec: ModelSpec
    bundle: Path


def with_random_weights(model: Any) -> Any:
    """Gates and modulations are not zero, so that every weight matters."""
    for key, tensor in model.state_dict().items():
        if key != POSITION_TABLE and tensor.is_floating_point():
            mean, std = weight_statistics(key, tuple(tensor.shape))
            tensor.copy_(random_tensor(5, key, tuple(tensor.shape), std=std, mean=mean))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny(
    traced_once: Callable[[], AbstractContextManager[object]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Tiny]:
    """``tiny(name, precision="fp32")``: one of `MODELS` and its bundle; not to be changed."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("onnxruntime")

    @functools.cache
    def make(name: str, precision: str = "fp32") -> Tiny:
        class_name, config, options = MODELS[name]
        model = with_random_weights(getattr(diffusers, class_name)(**config))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder / "checkpoint")
        spec, source = open_weights(folder / "checkpoint")
        spec = dataclasses.replace(spec, residuals=options.get("residuals", 0))
        split = {name: value for name, value in options.items() if name == "split_conditioning"}
        request = ExportRequest(
            spec, source, PRECISIONS[precision], out=folder / "bundle", ranges=RANGES, verify=False, **split
        )
        with traced_once():
            export(request)
        return Tiny(name, model, spec, folder / "bundle")

    return make


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _vae(kind: str) -> Any:
    """A VAE that makes a latent of a picture of 8 times its side (2 for SD3, which costs less)."""
    import diffusers

    torch.manual_seed(3)
    if kind == "qwen-image":
        return diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0, 0.1, -0.1, 0.2], latents_std=[1.0, 1.1, 0.9, 1.2],
        ).eval()  # fmt: skip
    levels = 3 if kind == "flux2" else 2
    sizes = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (4,) * levels,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }
    if kind == "flux2":
        return diffusers.AutoencoderKLFlux2(latent_channels=4, **sizes).eval()
    channels = 16 if kind == "sd3" else 4
    return diffusers.AutoencoderKL(
        latent_channels=channels, scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False,
        use_post_quant_conv=False, **sizes,
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def vae() -> Callable[[str], Any]:
    """``vae(family)``: tiny, with random weights."""
    return functools.cache(_vae)


def random(key: str, *shape: int) -> Tensor:
    return random_tensor(7, key, shape, std=1.0)


@pytest.fixture(scope="session")
def pipeline(vae: Callable[[str], Any]) -> Callable[..., Any]:
    """``pipeline(class_name, transformer, family, **others)``: no text encoders, prompts are given embedded."""
    import diffusers

    def make(class_name: str, transformer: Any, family: str, **others: Any) -> Any:
        cls = getattr(diffusers, class_name)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family != "sd3")
        given = {"transformer": transformer, "scheduler": scheduler, "vae": vae(family), **others}
        names, _ = cls._get_signature_keys(cls)
        pipe = cls(**{**dict.fromkeys(names), **given})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def prompts() -> Callable[..., dict[str, Tensor]]:
    """``prompts(family, batch=1, negative=False)``: embedded prompts, as a family's pipelines call them."""

    def make(family: str, batch: int = 1, *, negative: bool = False) -> dict[str, Tensor]:
        made = {"prompt_embeds": random("text", batch, 7, TEXT)}
        if family in ("sd3", "flux1"):
            made["pooled_prompt_embeds"] = random("pooled", batch, POOLED)
        if family == "qwen-image":
            made["prompt_embeds_mask"] = (torch.arange(7) < torch.tensor([[5], [7]])[:batch]).long()
        if negative:  # no text of the same length, where the family allows it
            tokens = 4 if family in ("flux2", "qwen-image") else 7
            made |= {
                f"negative_{name}": random("negative", batch, tokens, TEXT) if name == "prompt_embeds"
                else (torch.ones(batch, tokens, dtype=torch.long) if name.endswith("mask") else -tensor)
                for name, tensor in list(made.items())
            }  # fmt: skip
        return made

    return make


def encode(pipe: Any, family: str) -> None:
    """Give a pipeline text encoders that are functions: SD3 and FLUX.1 repeat no embedded prompts for more images."""

    def embed(key: str, *shape: int) -> Callable[..., Tensor]:
        def embedded(prompt: list[str], num_images_per_prompt: int, **_: Any) -> Tensor:
            texts = torch.cat([random(f"{key} {text}", 1, *shape) for text in prompt])
            return texts.repeat_interleave(num_images_per_prompt, 0)

        return embedded

    pipe._get_t5_prompt_embeds = embed("t5", 7, TEXT)
    pooled = embed("pooled", POOLED if family == "flux1" else POOLED // 2)  # SD3 has two of these
    clip = embed("clip", 5, 10)

    def of_sd3(*prompt: list[str], **given: Any) -> tuple[Tensor, Tensor]:
        return clip(*prompt, **given), pooled(*prompt, **given)

    pipe._get_clip_prompt_embeds = pooled if family == "flux1" else of_sd3


@pytest.fixture(scope="session")
def with_text_encoders() -> Callable[[Any, str], None]:
    """``with_text_encoders(pipe, family)``: it takes prompts as texts then."""
    return encode


@pytest.fixture(scope="session")
def controlnet() -> Callable[[bool], Any]:
    """``controlnet(masked)``: a tiny ControlNet for SD3 with one residual, that reads a mask too."""
    import diffusers

    config = {name: value for name, value in _SD3.items() if name != "qk_norm"} | {"num_layers": 1}

    def make(masked: bool) -> Any:
        extra = {"extra_conditioning_channels": 1} if masked else {}
        return with_random_weights(diffusers.SD3ControlNetModel(**config, **extra))

    return make


@pytest.fixture(scope="session")
def engine_of(tiny: Callable[..., Tiny]) -> Callable[..., Any]:
    """``engine_of(name, precision="fp32")``: the bundle's engine as a pipeline's transformer."""
    from mmdit_deploy.diffusers import MMDiTEngineTransformer

    return functools.cache(lambda *model: MMDiTEngineTransformer.from_bundle(tiny(*model).bundle, "ort-cpu"))
