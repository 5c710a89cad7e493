"""Fuse: many spellings up to one, in standard opset-23 ops."""

from mmdit_deploy.graph.fuse import clean
from mmdit_deploy.graph.fuse.attention.attention_layout import attention_heads, attention_layout
from mmdit_deploy.graph.fuse.attention.attention_mask import attention_mask
from mmdit_deploy.graph.fuse.attention.sdpa import sdpa
from mmdit_deploy.graph.fuse.gated_residual import gated_residual
from mmdit_deploy.graph.fuse.gelu import gelu
from mmdit_deploy.graph.fuse.modulate import modulate
from mmdit_deploy.graph.fuse.norms.layer_norm import layer_norm
from mmdit_deploy.graph.fuse.norms.norm_casts import norm_casts
from mmdit_deploy.graph.fuse.norms.norm_weights import norm_weights
from mmdit_deploy.graph.fuse.norms.rms_norm import rms_norm
from mmdit_deploy.graph.fuse.norms.zero_bias import zero_bias
from mmdit_deploy.graph.fuse.opset import opset
from mmdit_deploy.graph.fuse.rotary.repeat import repeat
from mmdit_deploy.graph.fuse.rotary.rope import rope
from mmdit_deploy.graph.fuse.shapes import shapes
from mmdit_deploy.graph.fuse.silu import silu
from mmdit_deploy.graph.fuse.swiglu import swiglu
from mmdit_deploy.graph.passes import Pass

# What a graph needs before rules can read it; ours is made so.
PREPARE: tuple[Pass, ...] = (opset, shapes, *clean.BEFORE)

# The exporter already writes one op per attention, norm and GELU; what is left is the layout around them.
FUSE: tuple[Pass, ...] = (
    layer_norm,
    rms_norm,  # leaves what is a LayerNorm
    norm_weights,
    zero_bias,
    norm_casts,  # of weights, too
    gelu,
    sdpa,
    attention_mask,
    attention_heads,
    repeat,
    rope,  # reads cosines and sines that are repeated
    attention_layout,  # reads norms and RoPE
    silu,
    swiglu,  # reads SiLUs
    modulate,  # reads norms
    gated_residual,
)

# What fusing leaves behind in others' graphs. Alone it is no reason to write a graph anew.
CLEAN: tuple[Pass, ...] = clean.AFTER

__all__ = ["CLEAN", "FUSE", "PREPARE"]
