"""Fuse: many spellings up to one, in standard opset-23 ops."""

from mmdit_deploy.graph.fuse.attention_layout import attention_layout
from mmdit_deploy.graph.fuse.opset import opset
from mmdit_deploy.graph.fuse.shapes import shapes
from mmdit_deploy.graph.passes import Pass

# What a graph needs before rules can read it; ours is made so.
PREPARE: tuple[Pass, ...] = (opset, shapes)

# The exporter already writes one op per attention, norm and GELU; what is left is the layout around them.
FUSE: tuple[Pass, ...] = (attention_layout,)

__all__ = ["FUSE", "PREPARE"]
