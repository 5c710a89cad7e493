"""Every graph in opset 23: the first with `Attention`, `RMSNormalization` and `RotaryEmbedding`."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.version_converter import convert_version

from mmdit_deploy.graph.passes import Pass

OPSET = 23


def _to_opset_23(model: ir.Model) -> int:
    if model.opset_imports.get("", OPSET) >= OPSET:
        return 0
    convert_version(model, target_version=OPSET, fallback=True)
    return 1


opset: Pass = Pass("opset 23", _to_opset_23)
