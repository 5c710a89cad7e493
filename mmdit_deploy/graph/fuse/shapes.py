"""The shape and type of every value, with symbols for what is dynamic: rules compare them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_shape_inference import infer_symbolic_shapes

from mmdit_deploy.graph.passes import Pass


def _infer(model: ir.Model) -> int:
    def known() -> int:
        return sum(v.shape is not None for node in model.graph.all_nodes() for v in node.outputs)

    before = known()
    infer_symbolic_shapes(model, warn_on_missing=False)
    return known() - before


shapes: Pass = Pass("shapes", _infer)
