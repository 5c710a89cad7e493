"""The I/O contract: what goes into an engine and comes out of it, and how large it may be."""

from mmdit_deploy.contract.axes import (
    AXES,
    DEFAULT_RANGES,
    TOKENS,
    Profile,
    Range,
    axis_range,
    parse_profile,
    profile_from_json,
    profile_to_json,
)
from mmdit_deploy.contract.contract import Contract, TensorSpec
from mmdit_deploy.contract.split import CONDITIONING, TABLE, SplitContract

__all__ = [
    "AXES",
    "CONDITIONING",
    "DEFAULT_RANGES",
    "TABLE",
    "TOKENS",
    "Contract",
    "Profile",
    "Range",
    "SplitContract",
    "TensorSpec",
    "axis_range",
    "parse_profile",
    "profile_from_json",
    "profile_to_json",
]
