"""diffusers' own pipelines make the same images with an engine as with the transformer that it was exported from.

The judges are diffusers' pipelines and transformers. Same seed, same prompts; the scheduler, the VAE and the guidance
are theirs in both. Prompts are given embedded, so that no text encoder is needed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdit_deploy.diffusers.adapters import ADAPTERS
from mmdit_deploy.errors import ContractError
from mmdit_deploy.families import FAMILIES
from mmdit_deploy.verify.metrics import compare

diffusers = pytest.importorskip("diffusers")

# One call agrees within 1e-5, the tolerance of fp32. Guidance by a scale s multiplies a difference by up to 2·s - 1,
# here 5, and steps add theirs up.
MAX_REL_L2 = 1e-4
MAX_PIXEL = 1e-3  # of an image from 0 to 1: a quarter of one of its 255 levels

WIDE, TALL = {"width": 32, "height": 24}, {"width": 16, "height": 32}  # 8 × 6 and 4 × 8 tokens; twice that for FLUX.2
STEPS = {"num_inference_steps": 3}


def picture(rows: int, cols: int) -> Any:
    from PIL import Image

    y, x = np.mgrid[:rows, :cols]
    return Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256], -1).astype(np.uint8))


def mask(rows: int, cols: int) -> Any:
    from PIL import Image

    return Image.fromarray((np.arange(cols) >= cols // 2).astype(np.uint8)[None].repeat(rows, 0) * 255)


@dataclass(frozen=True)
class Use:
    """How a pipeline is called.

    Args:
        pipeline: diffusers' class.
        model: the tiny transformer.
        call: arguments, besides the prompts.
        prompts: how many.
        negative: with negative prompts.
        texts: prompts as texts.
    """

    pipeline: str
    model: str
    call: dict[str, Any] = field(default_factory=dict)
    prompts: int = 1
    negative: bool = False
    texts: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return next(f for f in ("sd3", "flux1", "flux2", "qwen-image") if self.model.startswith(f))

    @property
    def guided(self) -> dict[str, Any]:
        """Guidance with negative prompts, as the family's pipelines call it."""
        return {"guidance_scale": 3.0} if self.family in ("sd3", "flux2") else {"true_cfg_scale": 3.0}


FROM_IMAGE = {"image": picture(24, 32), "strength": 0.7, **WIDE}
REPAINT = {**FROM_IMAGE, "mask_image": mask(24, 32)}
LARGER = {"width": 64, "height": 48}
USES: Mapping[str, Use] = {
    # Stable Diffusion 3
    "sd3": Use("StableDiffusion3Pipeline", "sd3", {**WIDE, "guidance_scale": 1.0}),
    "sd3-guidance-in-one-batch": Use("StableDiffusion3Pipeline", "sd3", TALL, negative=True),
    "sd3-images-per-prompt": Use(
        "StableDiffusion3Pipeline", "sd3", {**WIDE, "num_images_per_prompt": 3}, texts=("a cat",)
    ),
    "sd3-image-to-image": Use("StableDiffusion3Img2ImgPipeline", "sd3", FROM_IMAGE, negative=True),
    "sd3-image-to-image-weak": Use(
        "StableDiffusion3Img2ImgPipeline", "sd3", {**FROM_IMAGE, "strength": 0.4}, negative=True
    ),
    "sd3-inpaint": Use("StableDiffusion3InpaintPipeline", "sd3", REPAINT, negative=True),
    "sd3-controlnet": Use(
        "StableDiffusion3ControlNetPipeline",
        "sd3-controlnet",
        {**WIDE, "control_image": picture(24, 32)},
        negative=True,
    ),
    "sd3-controlnet-inpaint": Use(
        "StableDiffusion3ControlNetInpaintingPipeline",
        "sd3-controlnet",
        {**WIDE, "control_image": picture(24, 32), "control_mask": mask(24, 32)},
        negative=True,
    ),
    "sd3-split-conditioning": Use("StableDiffusion3Pipeline", "sd3-split", WIDE, negative=True),
    "sd3-without-its-controlnet": Use("StableDiffusion3Pipeline", "sd3-controlnet", WIDE, negative=True),
    # FLUX.1
    "flux1": Use("FluxPipeline", "flux1", {**WIDE, "guidance_scale": 3.5}),
    "flux1-negative-prompt": Use("FluxPipeline", "flux1", TALL, negative=True),
    "flux1-images-per-prompt": Use(
        "FluxPipeline", "flux1", {**WIDE, "num_images_per_prompt": 3}, texts=("a cat", "a dog")
    ),
    "flux1-schnell": Use("FluxPipeline", "flux1-schnell", WIDE),
    "flux1-image-to-image": Use("FluxImg2ImgPipeline", "flux1", FROM_IMAGE),
    "flux1-inpaint": Use("FluxInpaintPipeline", "flux1", REPAINT),
    "flux1-kontext": Use(
        "FluxKontextPipeline", "flux1", {**WIDE, "image": picture(16, 24), "_auto_resize": False, "max_area": 768}
    ),
    "flux1-kontext-inpaint": Use(
        "FluxKontextInpaintPipeline", "flux1", {**REPAINT, "_auto_resize": False, "max_area": 768}
    ),
    "flux1-fill": Use("FluxFillPipeline", "flux1-fill", {**WIDE, "image": picture(24, 32), "mask_image": mask(24, 32)}),
    "flux1-control": Use("FluxControlPipeline", "flux1-control", {**WIDE, "control_image": picture(24, 32)}),
    "flux1-control-image-to-image": Use(
        "FluxControlImg2ImgPipeline", "flux1-control", {**FROM_IMAGE, "control_image": picture(24, 32)}
    ),
    "flux1-control-inpaint": Use(
        "FluxControlInpaintPipeline", "flux1-control", {**REPAINT, "control_image": picture(24, 32)}
    ),
    # FLUX.2
    "flux2": Use("Flux2Pipeline", "flux2", LARGER),
    "flux2-images-per-prompt": Use("Flux2Pipeline", "flux2", {**LARGER, "num_images_per_prompt": 2}, prompts=2),
    "flux2-references": Use("Flux2Pipeline", "flux2", {**LARGER, "image": [picture(64, 64), picture(64, 80)]}),
    "flux2-of-klein": Use("Flux2Pipeline", "flux2-klein", LARGER),
    "flux2-klein": Use("Flux2KleinPipeline", "flux2-klein", {**LARGER, "image": picture(64, 64)}, negative=True),
    "flux2-klein-inpaint": Use(
        "Flux2KleinInpaintPipeline",
        "flux2-klein",
        {"image": picture(64, 64), "mask_image": mask(64, 64), "strength": 0.7, "width": 64, "height": 64},
        negative=True,
    ),
    # Qwen-Image
    "qwen-image": Use("QwenImagePipeline", "qwen-image", WIDE),
    "qwen-image-negative-prompt": Use("QwenImagePipeline", "qwen-image", TALL, negative=True),
    "qwen-image-images-per-prompt": Use(
        "QwenImagePipeline", "qwen-image", {**WIDE, "num_images_per_prompt": 3}, prompts=2
    ),
    "qwen-image-image-to-image": Use("QwenImageImg2ImgPipeline", "qwen-image", FROM_IMAGE, negative=True),
    "qwen-image-inpaint": Use("QwenImageInpaintPipeline", "qwen-image", REPAINT, negative=True),
    "qwen-image-edit": Use("QwenImageEditPipeline", "qwen-image", {**WIDE, "image": picture(24, 32)}, negative=True),
    "qwen-image-edit-inpaint": Use("QwenImageEditInpaintPipeline", "qwen-image", REPAINT, negative=True),
    "qwen-image-edit-plus": Use(
        "QwenImageEditPlusPipeline",
        "qwen-image",
        {**WIDE, "image": [picture(24, 32), picture(16, 16)]},
        negative=True,
    ),
    "qwen-image-edit-2511": Use(
        "QwenImageEditPlusPipeline", "qwen-image-edit-2511", {**WIDE, "image": [picture(24, 32)]}, negative=True
    ),
}


@pytest.fixture(autouse=True)
def _small_references() -> Iterator[None]:
    """Qwen-Image's pipelines make references of a million pixels, which takes seconds: here of 768."""
    folder = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    with contextlib.ExitStack() as stack:
        for module in (folder, f"{folder}_inpaint"):
            stack.enter_context(mock.patch(f"{module}.calculate_dimensions", lambda area, ratio: (32, 24, None)))
        stack.enter_context(mock.patch(f"{folder}_plus.VAE_IMAGE_SIZE", 768))
        stack.enter_context(mock.patch(f"{folder}_plus.CONDITION_IMAGE_SIZE", 768))
        yield


@pytest.fixture
def make_images(
    pipeline: Callable[..., Any],
    prompts: Callable[..., dict[str, Tensor]],
    with_text_encoders: Callable[..., None],
    controlnet: Any,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``make_images(use, transformer, **more)``: the images [B, 3, H, W], and all steps' latents."""

    def make(use: Use, transformer: Any, **more: Any) -> tuple[Tensor, Tensor]:
        others = {"controlnet": controlnet("Inpaint" in use.pipeline)} if "ControlNet" in use.pipeline else {}
        pipe = pipeline(use.pipeline, transformer, use.family, **others)
        if use.texts:
            with_text_encoders(pipe, use.family)
        latents: list[Tensor] = []

        def keep(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            latents.append(tensors["latents"].clone())
            return {}

        given = prompts(use.family, use.prompts, negative=use.negative)
        arguments = {
            **({"prompt": list(use.texts)} if use.texts else given),
            **(use.guided if use.negative else {}),
            **STEPS,
            "generator": torch.Generator().manual_seed(11),
            "output_type": "pt",
            "callback_on_step_end": keep,
            **use.call,
            **more,
        }
        torch.manual_seed(13)  # some pipelines sample the VAE's latents without their generator
        images = pipe(**arguments).images
        return images, torch.stack(latents) if latents else torch.empty(0)

    return make


# Transformers that take seconds more to export, and differ in what other tests cover: parity of each is in make test.
RARER = ("flux1-schnell", "flux1-control", "qwen-image-edit-2511", "sd3-controlnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (use.model in RARER)) for name, use in USES.items()]
)
def test_images_agree(
    name: str, tiny: Callable[..., Any], engine_of: Callable[..., Any], make_images: Callable[..., Any]
) -> None:
    use = USES[name]
    expected, expected_steps = make_images(use, tiny(use.model).original)
    images, steps = make_images(use, engine_of(use.model))
    assert images.shape == expected.shape and images.dtype == expected.dtype
    assert steps.shape == expected_steps.shape
    assert compare(steps[-1], expected_steps[-1]).rel_l2 <= MAX_REL_L2
    assert (images - expected).abs().max() <= MAX_PIXEL


IN_16_BIT = {  # few steps, in which a wrong timestep shows
    "sd3": Use("StableDiffusion3Pipeline", "sd3", {**WIDE, "guidance_scale": 1.0}),
    "flux1": Use("FluxPipeline", "flux1", {**WIDE, "guidance_scale": 3.5}),
    "flux2": Use("Flux2Pipeline", "flux2", LARGER),
    "qwen-image": Use("QwenImagePipeline", "qwen-image", WIDE),
}
# Other roundings of the same size end a little further off, or nearer: measured 0.17 (FLUX.1 in bf16, where diffusers
# rounds the guidance) to 1.02. With the timestep as the pipeline gives it, FLUX.2 in bf16 is at 1.57.
NO_FURTHER = 1.1
IN_MAKE_TEST = {("flux2", "bf16")}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[pytest.mark.soak] * ((name, precision) not in IN_MAKE_TEST))
        for name in IN_16_BIT
        for precision in ("fp16", "bf16")
    ],
)
def test_a_16_bit_pipeline_is_no_further_from_fp32_than_with_diffusers_transformer(
    name: str,
    precision: str,
    tiny: Callable[..., Any],
    engine_of: Callable[..., Any],
    pipeline: Callable[..., Any],
    prompts: Callable[..., dict[str, Tensor]],
) -> None:
    use = IN_16_BIT[name]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def latent(transformer: Any, dtype: torch.dtype) -> Tensor:
        embedded = {n: t.to(dtype) if t.is_floating_point() else t for n, t in prompts(use.family).items()}
        more = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
        pipe = pipeline(use.pipeline, transformer, use.family)
        return pipe(**embedded, **more, **use.call).images.float()  # type: ignore[no-any-return]

    original = tiny(name, precision).original
    best = latent(original, torch.float32)
    theirs = latent(copy.deepcopy(original).to(dtype), dtype)
    ours = latent(engine_of(name, precision), dtype)
    assert compare(ours, best).rel_l2 <= NO_FURTHER * compare(theirs, best).rel_l2


def test_every_pipeline_of_these_transformers_is_shown_or_known_not_to_work() -> None:
    refused = {
        "FluxControlNetPipeline": "controlnet_block_samples",
        "FluxControlNetImg2ImgPipeline": "controlnet_block_samples",
        "FluxControlNetInpaintPipeline": "controlnet_block_samples",
        "Flux2KleinKVPipeline": "kv_cache",
        "QwenImageControlNetPipeline": "controlnet_block_samples",
        "QwenImageControlNetInpaintPipeline": "controlnet_block_samples",
        "QwenImageLayeredPipeline": "additional_t_cond",
        "StableDiffusion3PAGPipeline": "attn_processors",
        "StableDiffusion3PAGImg2ImgPipeline": "attn_processors",
    }
    known = {name for adapter in ADAPTERS.values() for name in adapter.arguments}
    assert set(refused.values()) - known == {"attn_processors"}  # called in test_transformer.py
    classes = {family.config_class for family in FAMILIES.values()}
    theirs = set()
    for name in dir(diffusers):
        if name.startswith(("StableDiffusion3", "Flux", "QwenImage")) and name.endswith("Pipeline"):
            takes = inspect.signature(getattr(diffusers, name)).parameters.get("transformer")
            if takes is not None and any(cls in str(takes.annotation) for cls in classes):
                theirs.add(name)
    assert theirs == {use.pipeline for use in USES.values()} | set(refused)


def test_a_callback_changes_what_follows(
    tiny: Callable[..., Any], engine_of: Callable[..., Any], make_images: Callable[..., Any]
) -> None:
    def half(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * 0.5, "prompt_embeds": tensors["prompt_embeds"] * 0.9}

    use = Use("StableDiffusion3Pipeline", "sd3", WIDE, negative=True)
    more = {"callback_on_step_end": half, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected, _ = make_images(use, tiny("sd3").original, **more)
    images, _ = make_images(use, engine_of("sd3"), **more)
    unchanged, _ = make_images(use, engine_of("sd3"))
    assert (images - expected).abs().max() <= MAX_PIXEL < (images - unchanged).abs().max()


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("sd3", "hidden_states", lambda t: t.unflatten(2, (-1, 2, 2)).transpose(3, 4).flatten(2)),
        ("sd3", "img_ids", lambda t: t.flip(1)),
        ("sd3", "timestep", lambda t: t / 1000),
        ("flux1", "timestep", lambda t: t * 1000),
        ("flux1", "guidance", lambda t: t + 1),
        ("flux2", "txt_ids", lambda t: t.flip(0)),
        ("qwen-image", "encoder_hidden_states_mask", torch.ones_like),
        ("qwen-image", "txt_ids", lambda t: t + 1),
    ],
)
def test_a_wrong_input_is_seen(
    name: str,
    tensor: str,
    change: Callable[[Tensor], Tensor],
    tiny: Callable[..., Any],
    engine_of: Callable[..., Any],
    make_images: Callable[..., Any],
) -> None:
    """Agreement that a wrong input does not break would show nothing."""
    ours = engine_of(name)
    engine = ours.engine

    def wrong(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return engine({**inputs, tensor: change(inputs[tensor]).contiguous()})  # type: ignore[no-any-return]

    _, expected = make_images(USES[name], tiny(name).original)
    with mock.patch.object(ours, "_engine", wrong):
        _, received = make_images(USES[name], ours)
    assert compare(received[-1], expected[-1]).rel_l2 > 10 * MAX_REL_L2


def test_a_batch_beyond_the_engine_names_the_option(engine_of: Callable[..., Any], make_images: Any) -> None:
    use = Use("StableDiffusion3Pipeline", "sd3", {**WIDE, "num_images_per_prompt": 4}, texts=("a cat",))
    with pytest.raises(ContractError, match=r"batch must be 1 to 6[^$]*received: 8[^$]*--batch 1:2:8"):
        make_images(use, engine_of("sd3"))  # guidance in one batch doubles it
    make_images(use, engine_of("sd3"), guidance_scale=1.0)


def test_the_attribute_of_a_pipeline_is_replaced(
    tiny: Callable[..., Any], engine_of: Callable[..., Any], pipeline: Any, prompts: Any
) -> None:
    pipe = pipeline("StableDiffusion3Pipeline", tiny("sd3").original, "sd3")
    arguments = {**prompts("sd3", negative=True), **WIDE, **STEPS, "output_type": "pt"}
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images
    pipe.transformer = engine_of("sd3")
    assert pipe.config.transformer == ("mmdit_deploy.diffusers.transformer", "MMDiTEngineTransformer")
    images = pipe(**arguments, generator=torch.Generator().manual_seed(5)).images
    assert (images - expected).abs().max() <= MAX_PIXEL
    pipe.enable_model_cpu_offload(device="cpu")  # there are hooks then, and nothing moves
    assert torch.equal(pipe(**arguments, generator=torch.Generator().manual_seed(5)).images, images)
    pipe.remove_all_hooks()
