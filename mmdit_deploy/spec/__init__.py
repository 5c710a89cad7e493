"""What a model is: `ModelSpec`, the presets, and reading a checkpoint's own config."""

from mmdit_deploy.spec.model_spec import BlockSpec, ModelSpec
from mmdit_deploy.spec.precision import PRECISIONS, Precision, precision

__all__ = ["PRECISIONS", "BlockSpec", "ModelSpec", "Precision", "precision"]
