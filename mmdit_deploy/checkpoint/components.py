"""What is in a file besides the transformer: ComfyUI's all-in-one files hold text encoders and a VAE too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmdit_deploy.checkpoint.safetensors_header import TensorInfo
from mmdit_deploy.checkpoint.strict_json import quote

MODEL_PREFIX = "model.diffusion_model."
# How keys of other components begin, or what they are, and what these are called. ComfyUI's supported_models.py,
# Stability's sgm and ldm.
_TEXT = "text encoder"
_OTHERS = (
    (re.compile(r"(?:first_stage_model|vae)\."), "VAE"),
    (re.compile(r"(?:text_encoders|text_encoder(?:_\d)?|cond_stage_model|conditioner(?:\.embedders)?)\."), _TEXT),
    (re.compile(r"(?:clip_vision(?:_model)?|image_encoder)\."), "image encoder"),
    (re.compile(r"model_ema\."), "averaged weights"),
    (
        re.compile(
            r"(?:model_sampling|denoiser|edm_vpred)\.|(?:v_pred|ztsnr|betas|logvar|logit_scale|scale_factor"
            r"|(?:sqrt_|log_one_minus_)?(?:recipm1?_|one_minus_)?alphas_cumprod(?:_prev)?|posterior_\w+)$"
        ),
        "noise schedule",
    ),
)


@dataclass(frozen=True)
class Component:
    """Tensors of a file that are not the transformer's, and are ignored.

    Args:
        name: for people; parts of it are from the file.
        tensors: how many.
        nbytes: of all of them.
    """

    name: str
    tensors: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.tensors} tensors, {self.nbytes / 1e6:.1f} MB)"


def split_components(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, str], tuple[Component, ...]]:
    """Parts a file's tensors into the transformer's and those of other components.

    The transformer's are all but those that are known to be of something else, with the prefix
    ``model.diffusion_model.`` or without: what is not understood is for `identify` to judge, never dropped.

    Args:
        tensors: all of the file, by key.

    Returns:
        The transformer's own key (without the prefix) by the file's, and the other components.
    """
    model: dict[str, str] = {}
    others: dict[str, list[TensorInfo]] = {}
    for key, info in tensors.items():
        if key.startswith(MODEL_PREFIX):
            model[key] = key.removeprefix(MODEL_PREFIX)
        elif name := _other(key):
            others.setdefault(name, []).append(info)
        else:
            model[key] = key
    components = (Component(name, len(infos), sum(i.nbytes for i in infos)) for name, infos in others.items())
    return model, tuple(components)


def _other(key: str) -> str | None:
    """What component a key is of, one text encoder apart from the other: ``text encoder 'clip_l'``."""
    for pattern, name in _OTHERS:
        if match := pattern.match(key):
            step = key[match.end() :].split(".")[0]
            return f"{name} {quote(step, 40)}" if name == _TEXT else name
    return None
