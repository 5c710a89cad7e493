"""Targets: what can be built, and from which dialect of the graph."""

from mmdit_deploy.build.targets import ORT_TARGETS, check_targets, dialect_of, execution_of

__all__ = ["ORT_TARGETS", "check_targets", "dialect_of", "execution_of"]
