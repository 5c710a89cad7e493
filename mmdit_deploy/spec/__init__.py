"""What a model is: `ModelSpec`, the presets, and reading a checkpoint's own config."""

from mmdit_deploy.spec.diffusers_config import spec_from_config
from mmdit_deploy.spec.model_spec import BlockSpec, ModelSpec
from mmdit_deploy.spec.precision import PRECISIONS, Precision, precision
from mmdit_deploy.spec.presets import PRESETS, from_depth, preset

__all__ = [
    "PRECISIONS",
    "PRESETS",
    "BlockSpec",
    "ModelSpec",
    "Precision",
    "from_depth",
    "precision",
    "preset",
    "spec_from_config",
]
