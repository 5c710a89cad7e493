"""Matrix products that read weights in PyTorch's [out, in] layout: no transposed second copy at load.

    MatMul(x, Transpose(w))   ⇒   com.microsoft.FusedMatMul(x, w, transB=1)

ONNX Runtime would fold the transpose into a copy of the weight. `Gemm(transB=1)` avoids it too, but takes tokens as a
matrix, and on CPU writes its bias in a pass of one thread: measured 8 % slower on the products of a 768-wide block.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import Ints
from mmdit_deploy.graph.lower.multi_head_attention import MICROSOFT
from mmdit_deploy.graph.passes import Pass, rule_pass

_TAKEN = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


class _Linear(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, op.Transpose(w, perm=Ints(1, 0)))

    def check(self, op: Any, x: Any, w: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if x.shape is None or len(x.shape) < 2:
            return result.fail("the rank is not known, or is a vector's", x)
        if x.dtype not in _TAKEN:
            return result.fail(f"FusedMatMul does not take {x.dtype.name if x.dtype else 'an unknown type'}", x)
        return result

    def rewrite(self, op: Any, x: Any, w: Any, **_: Any) -> Any:
        return op.FusedMatMul(x, w, transB=1, _domain=MICROSOFT)


linear: Pass = rule_pass("linear without transpose", _Linear.rule())
