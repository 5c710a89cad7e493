"""Architectures by name, as data, and the depth rule of the SD3 paper."""

from __future__ import annotations

from mmdit_deploy.errors import UsageError
from mmdit_deploy.spec.model_spec import ModelSpec, require_depth

# Each as published: stabilityai/stable-diffusion-3-medium-diffusers, -3.5-large, -3.5-medium, transformer/config.json.
PRESETS = {
    spec.name: spec
    for spec in (
        ModelSpec("sd3-medium", depth=24, num_heads=24, qk_norm=False),
        ModelSpec("sd3.5-large", depth=38, num_heads=38),
        ModelSpec("sd3.5-medium", depth=24, num_heads=24, dual_attention_blocks=tuple(range(13)), pos_max_size=384),
    )
}


def preset(name: str) -> ModelSpec:
    """Look an architecture up by name.

    Raises:
        UsageError: there is no such preset.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UsageError(
            f"a preset is one of {', '.join(PRESETS)}", received=repr(name), fix="name one, or use --depth N"
        ) from None


def from_depth(depth: int) -> ModelSpec:
    """The SD3 paper's scaling rule (arXiv:2403.03206, section 5.3): width 64·depth, one head of 64 per block.

    Args:
        depth: 1 to 128. 24 has 2.03 B parameters.

    Raises:
        SpecError: not a depth.
    """
    require_depth(depth)
    return ModelSpec(f"mmdit-{depth}", depth=depth, num_heads=depth)
