"""A LayerNorm's bias of zeros, which TorchScript writes where the module has none.

LayerNormalization(x, w, zeros)   ⇒   LayerNormalization(x, w)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.passes import Pass, like, rule_pass

_SMALL = 65536  # elements: a bias of more is not read


class _ZeroBias(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, w: Any, b: Any) -> Any:
        return op.LayerNormalization(x, w, b, _allow_other_attributes=True, _outputs=["normed"])

    def check(self, op: Any, b: Any, normed: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        tensor = None if b.is_graph_input() else ir.convenience.get_const_tensor(b)
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _SMALL:
            return result.fail()  # a bias like any other
        return result if not np.any(tensor.numpy()) and len(normed.producer().outputs) == 1 else result.fail()

    def rewrite(self, op: Any, x: Any, w: Any, normed: Any, **_: Any) -> Any:
        return like(op.LayerNormalization(x, w, **normed.producer().attributes), normed, list(normed.shape or ()))


zero_bias: Pass = rule_pass("zero bias", _ZeroBias.rule())
