"""Linear layers as Gemm, which reads weights in PyTorch's [out, in] layout: no transposed second copy at load.

MatMul(x, Transpose(w)) + b   ⇒   Reshape(Gemm(Reshape(x), w, b, transB))
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _Linear(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, w: Any, b: Any) -> Any:
        return op.Add(op.MatMul(x, op.Transpose(w, perm=[1, 0])), b, _outputs=["y"])

    def check(self, op: Any, x: Any, w: Any, b: Any, y: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        if x.shape is None or len(x.shape) != 3 or not isinstance(x.shape[2], int):
            return result.fail("not tokens [B, N, C] of a known width", x)
        if w.shape is None or len(w.shape) != 2 or not isinstance(w.shape[0], int):
            return result.fail("not a matrix of a known size", w)
        if b.shape is None or list(b.shape) != [w.shape[0]]:
            return result.fail("not a bias per output channel", b)
        return result

    def rewrite(self, op: Any, x: Any, w: Any, b: Any, **_: Any) -> Any:
        channels_in, channels_out = x.shape[2], w.shape[0]
        rows = ir.SymbolicDim(f"{x.shape[0]}*{x.shape[1]}")

        def ints(*values: int) -> Any:
            return op.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))

        flat = like(op.Reshape(x, ints(-1, channels_in)), x, [rows, channels_in])
        product = like(op.Gemm(flat, w, b, transB=1), x, [rows, channels_out])
        shape = op.Concat(op.Shape(x, start=0, end=2), ints(channels_out), axis=0)
        return op.Reshape(product, shape)


linear: Pass = rule_pass("linear as Gemm", _Linear.rule())
