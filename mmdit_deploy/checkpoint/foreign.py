"""Kinds of files that are no transformer to export, by how their keys look: what to say, and what to pass instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import CheckpointError

_ORIGINAL = "pass the fp16 or bf16 checkpoint that it was made from: precision is chosen at export"
_FAMILY = "pass the file of the diffusion transformer itself"
_QUANTIZED = "a quantized model, whose weights come with scales"
# In this order: quantized transformers have low-rank factors too, and LoRAs and ControlNets the names of UNet blocks.
_KINDS = (
    (
        _QUANTIZED,
        r"\.(?:scale_weight|weight_scale(?:_2)?|input_scale|scale_input|comfy_quant|qweight|qzeros|wscales|SCB)$"
        r"|\.(?:absmax|nested_absmax|quant_map|quant_state\.[\w.]+)$|(?:^|\.)scaled_fp8$",
        _ORIGINAL,
    ),
    (
        "a LoRA",
        r"[._](?:lora_(?:A|B|up|down)|lora\.(?:up|down)|lokr_\w+|hada_\w+|oft_\w+|dora_scale)(?:\.|$)",
        "pass the checkpoint that it was trained on, and this file as --lora FILE",
    ),
    (
        "a ControlNet",
        r"^(?:control_model|controlnet_\w+|pos_embed_input|control_add_embedding|zero_convs)\.",
        "pass the checkpoint of the transformer that it steers",
    ),
    (
        "a UNet (Stable Diffusion 1, 2 or XL)",
        r"^(?:input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)\.",
        "no engine is made of UNets: pass a transformer",
    ),
    ("a VAE", r"^(?:encoder|decoder)\.(?:down|up|mid|conv_in|conv_out)", _FAMILY),
    (
        "a text encoder",
        r"^(?:text_model|transformer\.text_model|encoder\.block|shared|model\.layers|model\.embed_tokens|lm_head"
        r"|language_model|visual|transformer\.resblocks)(?:\.|$)",
        _FAMILY,
    ),
)  # fmt: skip


def refuse_foreign(keys: Iterable[str], rule: str) -> CheckpointError | None:
    """The error for a file of a kind that we know, and do not read; None where it is of none.

    Args:
        keys: of its tensors.
        rule: that it breaks.
    """
    listed = sorted(keys)
    for what, pattern, fix in _KINDS:
        found = [key for key in listed if re.search(pattern, key)]
        if found:
            return CheckpointError(rule, received=f"{what}: {len(found)} keys like {quote(found[0])}", fix=fix)
    return None


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Check that a config.json is of a model whose weights are as they were trained.

    Args:
        config: as parsed.
        where: how to name the file in messages.

    Raises:
        CheckpointError: it says how the weights were quantized, as diffusers writes it.
    """
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"the weights that {where} is about must be stored in fp32, fp16 or bf16",
            received=f"{_QUANTIZED}: quantization_config, by {quote(name, 40)}",
            fix=_ORIGINAL,
        )
