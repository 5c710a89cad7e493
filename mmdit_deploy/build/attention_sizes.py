"""Profiles that TensorRT has FP8 attention for: refused before a build are those that it has not.

Measured on TensorRT-RTX 1.7, heads of 64 and 128 wide: from 32 tokens on in a profile's minimum, an attention with Q,
K, V and softmax in FP8 is one kernel. Below, it silently becomes two products with the scores written out between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmdit_deploy.contract import Profile
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.recipe import FP8_ATTENTION_TOKENS
from mmdit_deploy.spec import ModelSpec


def check_profiles(spec: ModelSpec, plan: PrecisionPlan, profiles: Sequence[Profile]) -> None:
    """Refuse profiles that FP8 attention is not fused for.

    Raises:
        UsageError: an attention that is planned in FP8 may have fewer tokens.
    """
    if not any(plan.attentions.values()):
        return
    alone = any(len(plan.attentions.get(f"blocks.{i}", ())) > 1 for i, _ in enumerate(spec.blocks))
    for profile in profiles:
        img, txt = profile["img_tokens"].min, profile["txt_tokens"].min
        # A second attention of a block is that of the image tokens alone (SD3.5-Medium).
        tokens, of = (img, "image tokens alone") if alone else (img + txt, "image and text tokens together")
        if tokens < FP8_ATTENTION_TOKENS:
            least = FP8_ATTENTION_TOKENS - (0 if alone else txt)
            raise UsageError(
                f"TensorRT has attention in FP8 from {FP8_ATTENTION_TOKENS} {of} on",
                received=f"a profile with {img} image and {txt} text tokens at least",
                fix=f"--img-tokens from {least} on, or fp8_attention = false in the recipe's [quantization]",
            )
