"""Only ops of opset 17, for runtimes that know no newer ones.

Whatever the standard graph has that opset 17 lacks is spelled out. LayerNormalization stays: it came with opset 17.
"""

from mmdit_deploy.graph.lower.decomposed_attention import attention
from mmdit_deploy.graph.lower.decomposed_gelu import gelu
from mmdit_deploy.graph.lower.decomposed_opset import opset_17
from mmdit_deploy.graph.lower.decomposed_rms_norm import rms_norm
from mmdit_deploy.graph.lower.rope_spelled_out import rope_spelled_out
from mmdit_deploy.graph.lower.spelled_out import spelled_out
from mmdit_deploy.graph.passes import Pass

DECOMPOSED: tuple[Pass, ...] = (
    spelled_out,  # what has a name of ours
    attention,
    rms_norm,
    rope_spelled_out,
    gelu,
    opset_17,  # the rest, one node at a time
)

__all__ = ["DECOMPOSED"]
