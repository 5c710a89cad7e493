"""The I/O table of an engine; sample inputs, profiles, buffers and checks derive from it."""

from mmdit_deploy.contract.contract import AXES, DEFAULT_RANGES, Contract, Range, TensorSpec

__all__ = ["AXES", "DEFAULT_RANGES", "Contract", "Range", "TensorSpec"]
