"""What a model is: `ModelSpec`, and the compute types that it can have."""

from mmdit_deploy.spec.depth import from_depth
from mmdit_deploy.spec.model_spec import BlockSpec, ModelSpec
from mmdit_deploy.spec.precision import BASES, DEFAULT_BASE, PRECISIONS, QUANTIZED, Precision, precision

__all__ = [
    "BASES",
    "DEFAULT_BASE",
    "PRECISIONS",
    "QUANTIZED",
    "BlockSpec",
    "ModelSpec",
    "Precision",
    "from_depth",
    "precision",
]
