"""Lower: one spelling down to what each runtime runs fastest."""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.graph.lower.adaln import adaln
from mmdit_deploy.graph.lower.batched_modulation import batched_modulation
from mmdit_deploy.graph.lower.emulate_bf16 import emulate_bf16
from mmdit_deploy.graph.lower.linear import linear
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.lower.multi_head_attention import MICROSOFT, multi_head_attention
from mmdit_deploy.graph.passes import Pass, PassResult, run

_ORT = (multi_head_attention, adaln, linear)

# What each dialect is made of, from the standard opset-23 graph.
DIALECTS: dict[str, tuple[Pass, ...]] = {
    "ort": _ORT,
    "ort-emulated-bf16": (*_ORT, emulate_bf16),
    # TensorRT reads the standard graph as it is; this one it builds, and runs, in less memory.
    "trt": (batched_modulation, mask_of_keys),
    # The standard graph's own numbers, where a runtime has no bf16 kernels.
    "standard-emulated-bf16": (emulate_bf16,),
}


def lower(model: ir.Model, dialect: str) -> tuple[ir.Model, tuple[PassResult, ...]]:
    """A copy of the standard graph in another dialect, and what each pass did."""
    lowered = model.clone()
    for imports in (lowered.opset_imports, *(f.opset_imports for f in lowered.functions.values())):
        imports[MICROSOFT] = 1
    return lowered, run(lowered, DIALECTS[dialect])


__all__ = ["DIALECTS", "lower"]
