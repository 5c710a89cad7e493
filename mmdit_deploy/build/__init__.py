"""Build engines from graphs, and read what was really built."""

from mmdit_deploy.build.flavours import RTX, TENSORRT, Flavour
from mmdit_deploy.build.records import EngineRecord, SegmentRecord
from mmdit_deploy.build.targets import (
    Target,
    check_targets,
    dialect_of,
    execution_of,
    parse_target,
    stepped_dialect_of,
)

__all__ = [
    "RTX",
    "TENSORRT",
    "EngineRecord",
    "Flavour",
    "SegmentRecord",
    "Target",
    "check_targets",
    "dialect_of",
    "execution_of",
    "parse_target",
    "stepped_dialect_of",
]
