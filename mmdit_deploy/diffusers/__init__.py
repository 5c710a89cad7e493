"""Engines inside diffusers' pipelines: a bundle takes the place of ``pipe.transformer``.

    engine = MMDiTEngineTransformer.from_bundle("dist/sd3.5-medium-fp16")
    pipe = StableDiffusion3Pipeline.from_pretrained(CHECKPOINT, transformer=engine, dtype=engine.dtype)

    pipeline ── [B, C, H, W] or packed tokens, t, text ──► adapter ── the contract's tensors ──► engine
             ◄── velocity, as diffusers' class returns it ──       ◄── sample [B, tokens, C] ──

The checkpoint's transformer is then neither downloaded nor loaded; diffusers logs that it knows another class.
``pipe.transformer = engine``, a pipeline's constructor, and ``from_pipe(pipe, transformer=engine, dtype=engine.dtype)``
take it as well.

Pipelines of diffusers 0.42.1 that images agree in:

| family | pipelines |
|---|---|
| SD3, SD3.5 | StableDiffusion3: Pipeline, Img2Img, Inpaint; with residuals ControlNet, ControlNetInpainting |
| FLUX.1 | Flux: Pipeline, Img2Img, Inpaint, Fill, Kontext, KontextInpaint, Control, ControlImg2Img, ControlInpaint |
| FLUX.2 | Flux2: Pipeline, KleinPipeline, KleinInpaint |
| Qwen-Image | QwenImage: Pipeline, Img2Img, Inpaint, Edit, EditInpaint, EditPlus |

What a pipeline asks of an engine that it cannot do is refused, and not ignored: ``skip_layers``, IP-Adapters, LoRAs and
their scale (`mmdit-export --lora` merges them), a ControlNet's residuals that the engine has no input for, FLUX.2's KV
cache, other types (an engine's precision was chosen when it was exported), ``enable_cache``, ``save_pretrained``,
copies (see `mmdit_deploy.diffusers.refusals`). It does not see what only looks for layers to hook: diffusers' functions
``apply_taylorseer_cache``, ``apply_layerwise_casting`` and their like find none, and do nothing without a word. Modular
pipelines were not tried.

Batches, images and texts beyond the engine's ranges are refused too, by the name of the option to export with. Guidance
in one batch (SD3) takes twice the images; guidance by two calls (FLUX's and Qwen-Image's ``true_cfg_scale``) does not.

`pipe.enable_model_cpu_offload()` frees an engine on a GPU between its uses, and loads it from the bundle again. Of a
bundle with split conditioning, both parts run in every step: a pipeline gives one timestep at a time.

Nothing here imports diffusers but `mmdit_deploy.diffusers.transformer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit_deploy.diffusers.transformer import MMDiTEngineTransformer


def __getattr__(name: str) -> Any:
    """The class is imported when it is asked for: diffusers takes seconds, and may be missing."""
    if name in __all__:
        from mmdit_deploy.diffusers.transformer import MMDiTEngineTransformer

        return MMDiTEngineTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MMDiTEngineTransformer"]
