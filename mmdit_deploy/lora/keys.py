"""How the tensors of LoRA files are called: the module that a key is about, and what of it the tensor is.

PEFT writes ``<module>.lora_A.weight`` and ``lora_B``, kohya's scripts ``lora_down``, ``lora_up`` and ``alpha`` with the
module's dots as underscores, XLabs ``down`` and ``up``, ComfyUI also whole differences (``diff``, ``diff_b``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum

from mmdit_deploy.checkpoint.weight_files import name_some
from mmdit_deploy.errors import CheckpointError


class Role(Enum):
    """What a tensor is in the LoRA of its module."""

    DOWN = "A"  # [rank, in]
    UP = "B"  # [out, rank]
    ALPHA = "alpha"  # a scalar
    UP_BIAS = "bias of B"  # [out], where PEFT was told lora_bias
    WEIGHT_DIFF = "diff"  # like the weight
    BIAS_DIFF = "diff_b"  # like the bias


# A name between the factor and "weight" is that of PEFT's adapter: lora_A.default.weight
_ROLES = (
    (Role.DOWN, r"\.lora_(?:A|down)(?:\.\w+)?\.weight|(?:\.lora|\.lora_linear_layer)?\.down\.weight"),
    (Role.UP, r"\.lora_(?:B|up)(?:\.\w+)?\.weight|(?:\.lora|\.lora_linear_layer)?\.up\.weight"),
    (Role.ALPHA, r"\.alpha"),
    (Role.UP_BIAS, r"\.lora_(?:B|up)(?:\.\w+)?\.bias"),
    (Role.WEIGHT_DIFF, r"\.diff"),
    (Role.BIAS_DIFF, r"\.diff_b"),
)
_PATTERNS = tuple((role, re.compile(rf"(.+?)(?:{leaf})")) for role, leaf in _ROLES)

# In front of a module's name: PEFT's wrapper, pipelines, ComfyUI, then kohya's scripts, OneTrainer and LyCORIS.
PREFIXES = (
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

# text_encoder. and text_encoder_2. (diffusers), text_encoders.clip_l. (ComfyUI), lora_te_, lora_te1_ … (kohya)
_TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?text_encoders?(?:_\d)?\.|lora_te\d?_")

# What adds something else than scale · alpha/rank · B·A, by a part of its tensors' names.
_VARIANTS = {
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.b?oft_",
    "(IA)³": r"\.ia3_|\.on_input$",
    "Tucker factors (LoCon)": r"\.lora_mid",
    "GLoRA": r"\.[ab][12]\.weight$",
    "AdaLoRA": r"\.lora_E",
    "VeRA": r"\.vera_",
    "LyCORIS norms": r"\.[wb]_norm$",
    "whole weights (ComfyUI)": r"\.(?:set|reshape)_weight$",
}


def is_text_encoder(key: str) -> bool:
    """Whether a tensor changes a text encoder, which is no part of the transformer."""
    return _TEXT_ENCODER.match(key) is not None


def split_key(key: str) -> tuple[str, Role] | None:
    """The module, as the file calls it, and the tensor's role; None where the name has no form that we know."""
    for role, pattern in _PATTERNS:
        if match := pattern.fullmatch(key):
            return match[1], role
    return None


def refuse_variants(keys: Iterable[str], where: str) -> None:
    """Check that a file holds a plain LoRA.

    Raises:
        CheckpointError: it holds another kind of adapter, which a sum with B·A would not apply.
    """
    keys = list(keys)
    for variant, pattern in _VARIANTS.items():
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            raise CheckpointError(
                f"{where} must be a plain LoRA: pairs of factors, with W + scale · alpha/rank · B·A",
                received=f"{variant}: {len(found)} tensors, {name_some(found, 3)}",
                fix="merge it into the checkpoint with the program that trained it, and export that",
            )
