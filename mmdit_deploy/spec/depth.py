"""The depth rule of the SD3 paper."""

from __future__ import annotations

from mmdit_deploy.spec.model_spec import ModelSpec, require_depth


def from_depth(depth: int) -> ModelSpec:
    """The SD3 paper's scaling rule (arXiv:2403.03206, section 5.3): width 64·depth, one head of 64 per block.

    Args:
        depth: 1 to 128. 24 has 2.03 B parameters.

    Raises:
        SpecError: not a depth.
    """
    require_depth(depth)
    return ModelSpec(f"mmdit-{depth}", depth=depth, num_heads=depth)
