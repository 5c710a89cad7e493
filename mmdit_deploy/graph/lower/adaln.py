"""AdaLN in one pass over the tokens.

    MMDiTModulate(LayerNormalization(x, ones), scale, shift)   ⇒   LayerNormalization(x, 1 + scale, shift)

ONNX lets scale and bias broadcast from one vector per sample, [B, 1, C]; ONNX Runtime's CPU and CUDA kernels take
them so since 1.21 (microsoft/onnxruntime#23297, made for SD3 and FLUX).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _AdaLN(RewriteRuleClassBase):
    def __init__(self) -> None:
        # A dual-attention block modulates one norm twice: each use gets its own, and the unused norm is swept up.
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, ones: Any, scale: Any, shift: Any) -> Any:
        normed = op.LayerNormalization(x, ones, _allow_other_attributes=True, _outputs=["normed"])
        return op.MMDiTModulate(normed, scale, shift, _domain=DOMAIN)

    def check(self, op: Any, x: Any, ones: Any, scale: Any, shift: Any, normed: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if normed.producer().attributes.get_int("axis", -1) not in (-1, 2):
            return result.fail("not over the channels alone", normed)
        if ones.const_value is None or not np.all(ones.const_value.numpy() == 1):
            return result.fail("the norm has a weight of its own", ones)
        for value in (scale, shift):
            if (
                x.shape is None
                or len(x.shape) != 3
                or value.shape is None
                or list(value.shape) != [x.shape[0], 1, x.shape[2]]
            ):
                return result.fail("not one vector per sample", value)
        if scale.dtype is None:
            return result.fail("the type is not known", scale)
        return result

    def rewrite(self, op: Any, x: Any, scale: Any, shift: Any, normed: Any, **_: Any) -> Any:
        one = op.Constant(value=ir.tensor(1.0, dtype=scale.dtype))
        factor = like(op.Add(scale, one), scale, scale.shape)
        return op.LayerNormalization(x, factor, shift, **normed.producer().attributes)


adaln: Pass = rule_pass("adaptive layer norm", _AdaLN.rule())
