"""Lower: one spelling down to what each runtime runs fastest."""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.graph.fuse.interface import kept_interface
from mmdit_deploy.graph.lower.adaln import adaln
from mmdit_deploy.graph.lower.batched_modulation import batched_modulation
from mmdit_deploy.graph.lower.decomposed import DECOMPOSED
from mmdit_deploy.graph.lower.emulate_bf16 import emulate_bf16
from mmdit_deploy.graph.lower.emulate_fp4 import emulate_fp4
from mmdit_deploy.graph.lower.functions_by_call import functions_by_call
from mmdit_deploy.graph.lower.joint_qk_norm import joint_qk_norm
from mmdit_deploy.graph.lower.linear import linear
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.lower.multi_head_attention import multi_head_attention
from mmdit_deploy.graph.lower.rope_spelled_out import rope_spelled_out
from mmdit_deploy.graph.lower.rotary_embedding import rotary_embedding
from mmdit_deploy.graph.lower.spelled_out import fp8_attention_spelled_out, spelled_out
from mmdit_deploy.graph.lower.trt_plugin import TRT_PLUGIN
from mmdit_deploy.graph.lower.trt_plugin_bodies import plugin_bodies
from mmdit_deploy.graph.passes import Pass, PassResult, run

_ORT = (multi_head_attention, adaln, linear, rotary_embedding)

# What each dialect is made of, from the standard opset-23 graph.
DIALECTS: dict[str, tuple[Pass, ...]] = {
    "ort": _ORT,
    "ort-emulated-bf16": (*_ORT, spelled_out, emulate_bf16),
    # TensorRT reads the standard graph as it is; this one it builds, and runs, in less memory.
    "trt": (
        batched_modulation,
        mask_of_keys,
        joint_qk_norm,
        rope_spelled_out,
        fp8_attention_spelled_out,
        functions_by_call,
    ),
    # Opset 17, for other runtimes.
    "decomposed": DECOMPOSED,
    # TensorRT before 10.14, with plugins; and the same nodes with what they compute, for ONNX Runtime.
    "trt-plugin": TRT_PLUGIN,
    "trt-plugin-bodies": (*TRT_PLUGIN, plugin_bodies),
    # The standard graph's own numbers, where a runtime has no bf16 kernels.
    "standard-emulated-bf16": (spelled_out, emulate_bf16),
    # And where it has none of FP4.
    "ort-emulated-fp4": (*_ORT, emulate_fp4),
    "ort-emulated-fp4-bf16": (*_ORT, spelled_out, emulate_fp4, emulate_bf16),
    "standard-emulated-fp4": (emulate_fp4,),
    "standard-emulated-fp4-bf16": (spelled_out, emulate_fp4, emulate_bf16),
}


def lower(model: ir.Model, dialect: str, *, explain: bool = False) -> tuple[ir.Model, tuple[PassResult, ...]]:
    """A copy of the standard graph in another dialect, and what each pass did."""
    lowered = model.clone()
    lowered.meta.update(model.meta)
    with kept_interface(lowered):
        return lowered, run(lowered, DIALECTS[dialect], explain=explain)


__all__ = ["DIALECTS", "lower"]
