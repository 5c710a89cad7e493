"""The families' adapters: how diffusers 0.42.1 calls each transformer, as data. Tests hold them against its classes.

| | `hidden_states` | timestep | positions |
|---|---|---|---|
| SD3 | a latent [B, C, H, W]: made tokens here, and the velocity a latent again | 0 to 1000 | none: made from H and W |
| FLUX.1, FLUX.2 | packed by the pipeline | 0 to 1, divided in the latents' type | `img_ids`, `txt_ids` |
| Qwen-Image | packed by the pipeline | 0 to 1 | `img_shapes`: frames, rows and columns of each image |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.diffusers.adapter import Adapter, Call, check_tokens, without_batch
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.families import Grid
from mmdit_deploy.sampling import patchify, unpatchify

_NO_CONTROLNET = "run without a ControlNet: mmdit-export makes an input for its residuals for SD3 alone"
_NO_KV_CACHE = "Flux2KleinPipeline computes the same without a cache; reference images are part of hidden_states"


def _latent_grid(call: Call) -> Grid:
    """Rows and columns of a latent's tokens."""
    shape, patch, most = call.hidden_states.shape, call.spec.patch_size, call.contract.max_side
    if len(shape) != 4 or shape[2] % patch or shape[3] % patch:
        raise ContractError(
            f"hidden_states is a latent [batch, channels, rows, columns] of whole patches of {patch} × {patch}",
            received=f"shape {list(shape)}",
            fix="choose a height and width that are multiples of the patch in pixels (16 for Stable Diffusion 3)",
        )
    rows, cols = shape[2] // patch, shape[3] // patch
    if most is not None and max(rows, cols) > most:
        raise ContractError(
            f"{call.spec.name} has positions for {most} rows and {most} columns of tokens",
            received=f"{rows} × {cols}",
            fix="make a smaller image",
        )
    return rows, cols


def _residuals(call: Call) -> dict[str, Tensor]:
    """A ControlNet's residuals as one tensor. Where there is none, they are zero: nothing is added."""
    given, count = call.arguments.get("block_controlnet_hidden_states"), call.spec.residuals
    if given is not None and not count:
        raise UsageError(
            "this engine has no input for a ControlNet's residuals",
            received=f"{len(given)} residuals",
            fix=f"mmdit-export … --controlnet {len(given)}",
        )
    if not count:
        return {}
    if given is None:
        rows, cols = _latent_grid(call)
        shape = (count, call.batch, rows * cols, call.spec.width)
        return {"block_controlnet_hidden_states": call.hidden_states.new_zeros(()).expand(shape)}
    if len(given) != count:
        raise UsageError(
            f"this engine takes {count} residuals of a ControlNet, as it was exported",
            received=f"{len(given)} residuals",
            fix=f"mmdit-export … --controlnet {len(given)}" if len(given) else "leave the empty list out",
        )
    return {"block_controlnet_hidden_states": torch.stack(tuple(given))}


def _sd3_inputs(call: Call) -> dict[str, Tensor]:
    grid = _latent_grid(call)
    tokens = patchify(call.hidden_states, call.spec.patch_size)
    return {"hidden_states": tokens, **call.ids(grid), **_residuals(call)}


def _sd3_sample(call: Call, sample: Tensor) -> Tensor:
    return unpatchify(sample, _latent_grid(call), call.spec.patch_size)


def _flux1_inputs(call: Call) -> dict[str, Tensor]:
    ids = {name: without_batch(call.arguments[name]) for name in ("img_ids", "txt_ids") if name in call.arguments}
    time = {"timestep": _undivided(call.arguments["timestep"])} if "timestep" in call.arguments else {}
    return {"hidden_states": call.hidden_states, **time, **ids}


def _undivided(timestep: Tensor) -> Tensor:
    """The timestep [batch], 0 to 1 in fp32, without the rounding of a division by 1000.

    Pipelines divide in the timestep's type, their latents', and diffusers' class multiplies in the latents' again,
    which undoes most of what that rounded: 752 in bf16 comes back as 752, and in fp32 as 753.9.
    """
    return (timestep * 1000).float() / 1000


def _flux2_inputs(call: Call) -> dict[str, Tensor]:
    guided = call.spec.guidance and "guidance" in call.arguments  # else diffusers' class has no use for it
    return {**_flux1_inputs(call), **({"guidance": call.arguments["guidance"]} if guided else {})}


def _qwen_image_inputs(call: Call) -> dict[str, Tensor]:
    images = _grids(call.arguments.get("img_shapes"))
    check_tokens(images, call.hidden_states.shape[1])
    mask = call.arguments.get("encoder_hidden_states_mask")
    if mask is None:  # every token is one
        mask = torch.ones((call.batch, call.txt_tokens), dtype=torch.bool, device=call.hidden_states.device)
    return {"hidden_states": call.hidden_states, "encoder_hidden_states_mask": mask, **call.ids(*images)}


def _grids(shapes: object) -> tuple[Grid, ...]:
    """Rows and columns of the images of a sample; diffusers takes the first sample's for all."""
    first = shapes[0] if isinstance(shapes, list | tuple) and shapes else None
    sizes: list[Any] = [size for size in (first if isinstance(first, list) else [first]) if _is_image(size)]
    if not sizes or (isinstance(first, list) and len(sizes) < len(first)):
        raise ContractError(
            "img_shapes lists for each sample its images, each as (1, rows, columns)",
            received=repr(shapes)[:200],
            fix="e.g. [[(1, 64, 64)]] * batch; videos are not of these models",
        )
    return tuple((rows, cols) for _, rows, cols in sizes)


def _is_image(size: Any) -> bool:
    return isinstance(size, list | tuple) and len(size) == 3 and size[0] == 1


ADAPTERS: Mapping[str, Adapter] = {
    "sd3": Adapter(
        tensors=("encoder_hidden_states", "pooled_projections", "timestep"),
        made_of=("block_controlnet_hidden_states",),
        make=_sd3_inputs,
        refused={"skip_layers": "call the pipeline without skip_guidance_layers: every layer is compiled in"},
        restore=_sd3_sample,
    ),
    "flux1": Adapter(
        tensors=("encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance"),
        make=_flux1_inputs,
        refused={
            "controlnet_block_samples": _NO_CONTROLNET,
            "controlnet_single_block_samples": _NO_CONTROLNET,
        },
        moot=("controlnet_blocks_repeat",),
    ),
    "flux2": Adapter(
        tensors=("encoder_hidden_states", "timestep", "img_ids", "txt_ids"),
        made_of=("guidance",),
        make=_flux2_inputs,
        refused={"kv_cache": _NO_KV_CACHE, "kv_cache_mode": _NO_KV_CACHE, "num_ref_tokens": _NO_KV_CACHE},
        moot=("ref_fixed_timestep",),
        output=("diffusers.models.transformers.transformer_flux2", "Flux2Transformer2DModelOutput"),
    ),
    "qwen-image": Adapter(
        tensors=("encoder_hidden_states", "timestep", "guidance"),
        made_of=("encoder_hidden_states_mask", "img_shapes"),
        make=_qwen_image_inputs,
        attention_kwargs="attention_kwargs",
        refused={
            "controlnet_block_samples": _NO_CONTROLNET,
            "additional_t_cond": "use QwenImagePipeline or QwenImageEditPipeline: Qwen-Image-Layered is not supported",
        },
    ),
}
