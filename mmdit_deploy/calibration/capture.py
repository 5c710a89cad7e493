"""Capture a transformer's inputs while somebody's own diffusers pipeline runs.

    with capture(pipe, "captured.safetensors"):
        pipe("a three", num_inference_steps=28)

Every call of the transformer becomes a sample in the terms of our contract: latents in tokens, positions as ids.
Nothing here imports diffusers: the transformer is known by its class's name, and read by the names of its arguments.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_deploy.atomic import written_together
from mmdit_deploy.calibration.captured import FORMAT
from mmdit_deploy.checkpoint import plan_layout, write_safetensors
from mmdit_deploy.eager.calls import Values
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import FAMILIES, position_ids, spec_from_config
from mmdit_deploy.sampling import patchify
from mmdit_deploy.spec import ModelSpec

# Arguments that say nothing about what is computed, or that we read in other words.
_KNOWN = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "img_shapes", "txt_seq_lens"}


@contextlib.contextmanager
def capture(pipeline: Any, path: str | os.PathLike[str], *, every: int = 1) -> Iterator[list[Values]]:
    """Write the inputs of a transformer's calls within the context to a file, which ``--calib`` takes.

    Captured tensors wait in memory until the end. An error within the context leaves no file.

    Args:
        pipeline: of diffusers, with a ``transformer`` of SD3, FLUX.1, FLUX.2 or Qwen-Image; or that transformer.
        path: of the file; one that exists is replaced.
        every: keep one call of so many, beginning with the first.

    Yields:
        What has been captured, call by call.

    Raises:
        UsageError: the transformer is of none of these classes, nothing was captured, or a call had an argument that
            the contract has no input for (IP-Adapters, ControlNets of FLUX, …).
    """
    transformer = getattr(pipeline, "transformer", pipeline)
    spec = _spec(transformer)
    signature = inspect.signature(transformer.forward)
    samples: list[Values] = []
    seen = 0

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if seen % every == 0:
            samples.append(_inputs(spec, signature.bind(*args, **kwargs).arguments))
        seen += 1

    handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield samples
    finally:
        handle.remove()
    if not samples:
        raise UsageError(
            "inputs are captured while the pipeline runs", received="no call of its transformer", fix="call it inside"
        )
    _write(Path(path), spec, samples)


def _spec(transformer: Any) -> ModelSpec:
    classes = [family.config_class for family in FAMILIES.values()]
    name = type(transformer).__name__
    if name not in classes:
        raise UsageError(
            f"inputs are captured from one of {', '.join(classes)}, or a pipeline that has one as its transformer",
            received=name,
            fix="pass the pipeline, before its transformer is wrapped or compiled",
        )
    return spec_from_config({**transformer.config, "_class_name": name}, name)


def _inputs(spec: ModelSpec, arguments: Mapping[str, Any]) -> Values:
    """A call's arguments as the contract's inputs, on the CPU."""
    given = {name: value for name, value in arguments.items() if value is not None}
    _refuse(spec, given)
    inputs = _READ[spec.family](spec, given)
    if not spec.guidance:
        inputs.pop("guidance", None)
    for name in ("timestep", "guidance"):
        if name in inputs:
            inputs[name] = inputs[name].float()
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in inputs.items()}


def _refuse(spec: ModelSpec, given: Mapping[str, Any]) -> None:
    """What changes the result and is no input of ours."""
    extras = {
        n: v for n, v in given.items() if n not in _KNOWN and not isinstance(v, Tensor) and v not in (False, 0, 0.0)
    }
    extras |= {n: v for n, v in given.items() if isinstance(v, Tensor) and n not in _TENSORS}
    if spec.family == "sd3":
        extras.pop("block_controlnet_hidden_states", None)
    for name in ("joint_attention_kwargs", "attention_kwargs"):
        extras |= {f"{name}[{key!r}]": value for key, value in (given.get(name) or {}).items() if key != "scale"}
    if extras:
        raise UsageError(
            f"a call of {spec.name} is captured where our model has an input for every argument",
            received=", ".join(sorted(extras)),
            fix="run the pipeline without adapters, and without what skips or caches blocks",
        )


_TENSORS = {
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "timestep",
    "pooled_projections",
    "guidance",
    "img_ids",
    "txt_ids",
}


def _read_sd3(spec: ModelSpec, given: Mapping[str, Any]) -> Values:
    latent = given["hidden_states"]
    rows, cols = (side // spec.patch_size for side in latent.shape[2:])
    inputs = {name: value for name, value in given.items() if name in _TENSORS}
    inputs["hidden_states"] = patchify(latent, spec.patch_size)
    inputs["img_ids"] = torch.from_numpy(position_ids(spec, [(rows, cols)], 1)[0])
    residuals = given.get("block_controlnet_hidden_states")
    if residuals:
        inputs["block_controlnet_hidden_states"] = torch.stack(list(residuals))
    return inputs


def _read_flux(spec: ModelSpec, given: Mapping[str, Any]) -> Values:
    inputs = {name: value for name, value in given.items() if name in _TENSORS}
    for name in ("img_ids", "txt_ids"):
        ids = inputs[name].float()
        inputs[name] = ids[0] if ids.ndim == 3 else ids  # every image of a batch has the same
    return inputs


def _read_qwen_image(spec: ModelSpec, given: Mapping[str, Any]) -> Values:
    inputs = {name: value for name, value in given.items() if name in _TENSORS}
    text = inputs["encoder_hidden_states"]
    mask = inputs.get("encoder_hidden_states_mask")
    inputs["encoder_hidden_states_mask"] = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    images = _grids(given["img_shapes"])
    inputs["img_ids"], inputs["txt_ids"] = map(torch.from_numpy, position_ids(spec, images, text.shape[1]))
    return inputs


def _grids(shapes: Sequence[Any]) -> list[tuple[int, int]]:
    """Rows and columns of the image that is made and of its references, in diffusers' ``img_shapes``.

    Raises:
        UsageError: images of a batch differ, or one has several frames.
    """
    each = [shape if isinstance(shape, list) else [shape] for shape in shapes]
    if any(images != each[0] for images in each) or any(frames != 1 for frames, *_ in each[0]):
        raise UsageError(
            "images of a batch have the same size, and one frame each", received=str(shapes), fix="capture them alone"
        )
    return [(rows, cols) for _, rows, cols in each[0]]


_READ: Mapping[str, Callable[[ModelSpec, Mapping[str, Any]], Values]] = {
    "sd3": _read_sd3,
    "flux1": _read_flux,
    "flux2": _read_flux,
    "qwen-image": _read_qwen_image,
}


def _write(path: Path, spec: ModelSpec, samples: Sequence[Values]) -> None:
    digits = max(4, len(str(len(samples) - 1)))
    tensors = [(f"{i:0{digits}}.{name}", t) for i, sample in enumerate(samples) for name, t in sample.items()]
    tensors.sort(key=lambda item: -item[1].dtype.itemsize)  # so that every one is aligned
    metadata = {"format": FORMAT, "family": spec.family}
    layout = plan_layout([(key, t.dtype, tuple(t.shape)) for key, t in tensors], metadata)
    with written_together([path]) as (partial,):
        write_safetensors(partial, layout, tensors)
