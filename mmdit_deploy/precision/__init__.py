"""Precision as data: which linear layer is quantized how, and which values stay in fp32."""

from mmdit_deploy.precision.plan import AttentionScales, LinearPlan, PrecisionPlan
from mmdit_deploy.precision.recipe import METHODS, QuantizationRecipe
from mmdit_deploy.precision.roles import ROLES, Role, linears, role_of
from mmdit_deploy.precision.schemes import SCHEMES, Scheme, Stored, stored

__all__ = [
    "METHODS",
    "ROLES",
    "SCHEMES",
    "AttentionScales",
    "LinearPlan",
    "PrecisionPlan",
    "QuantizationRecipe",
    "Role",
    "Scheme",
    "Stored",
    "linears",
    "role_of",
    "stored",
]
