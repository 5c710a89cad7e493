"""Clean-up: what exporters leave behind. Each pass is small, counts what it did, and a second run does nothing.

All of it is for others' graphs. Ours is written clean, and its names are part of what a bundle promises.
"""

from mmdit_deploy.graph.fuse.clean import duplicates, transposes, unused
from mmdit_deploy.graph.fuse.clean.casts import casts
from mmdit_deploy.graph.fuse.clean.constants import constants
from mmdit_deploy.graph.fuse.clean.identities import identities
from mmdit_deploy.graph.passes import Pass

# Before rules read the graph: equal values become one value, which patterns ask for.
BEFORE: tuple[Pass, ...] = (
    constants,
    identities,
    casts,
    transposes.cancelled,
    duplicates.initializers,
    duplicates.expressions,
    unused.nodes,
    unused.imports,
)

# After they fired: what they left between themselves.
AFTER: tuple[Pass, ...] = (
    casts,
    transposes.cancelled,
    transposes.merged,
    duplicates.expressions,
    unused.nodes,
    unused.imports,
)

__all__ = ["AFTER", "BEFORE"]
