"""Every channel of x [N, C] several times in a row, without a lookup: how optimum writes repeat_interleave.

    x ─ Transpose ─ Unsqueeze ─ Expand [C, r, N] ─ GatherND(places where a mask is true) ─ Transpose

        ⇒   x ─ Unsqueeze ─ Expand [N, C, r] ─ Reshape [N, C·r]

where the mask is true everywhere. RoPE's cosines and sines, which are there once per pair, are spelled so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import Ints, given_by_call
from mmdit_deploy.graph.fuse.known_values import known
from mmdit_deploy.graph.passes import Pass, like, rule_pass


class _Repeat(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, axis: Any, shape: Any, index: Any, limit: Any) -> Any:
        x_CN = op.Transpose(x, perm=Ints(1, 0))
        x_CrN = op.Expand(op.Unsqueeze(x_CN, axis), shape, _outputs=["x_CrN"])
        places = op.Transpose(op.NonZero(op.Less(index, limit)), perm=Ints(1, 0))
        return op.Transpose(op.GatherND(x_CrN, places, _outputs=["x_RN"]), perm=Ints(1, 0))

    def check(self, op: Any, x: Any, axis: Any, index: Any, limit: Any, x_CrN: Any, x_RN: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        lookup = x_RN.producer()
        if given_by_call(lookup) is not None or lookup.attributes.get_int("batch_dims", 0):
            return result.fail("it is looked up for each channel by itself", x_RN)
        at, indices, limits = known(axis), known(index), known(limit)
        if at is None or at.tolist() != [1]:
            return result.fail("what is repeated is not the first axis", axis)
        if x.shape is None or x_CrN.shape is None or not all(isinstance(d, int) for d in x_CrN.shape[:2]):
            return result.fail("channels or repeats are not known", x_CrN)
        if indices is None or limits is None:
            return result.fail("how often each channel is repeated is not known", limit)
        mask = indices < limits
        if mask.shape != tuple(x_CrN.shape[:2]) or not np.all(mask):
            return result.fail("not every channel is repeated as often", limit)
        return result

    def rewrite(self, op: Any, x: Any, x_CrN: Any, **_: Any) -> Any:
        tokens, channels = x.shape
        repeats = x_CrN.shape[1]
        x_NC1 = like(op.Unsqueeze(x, _ints(op, 2)), x, [tokens, channels, 1])
        x_NCr = like(op.Expand(x_NC1, _ints(op, 1, 1, repeats)), x, [tokens, channels, repeats])
        return like(op.Reshape(x_NCr, _ints(op, 0, channels * repeats)), x, [tokens, channels * repeats])


def _ints(op: Any, *numbers: int) -> ir.Value:
    return op.Constant(value=ir.tensor(list(numbers), dtype=ir.DataType.INT64))


repeat: Pass = rule_pass("repeated channels", _Repeat.rule())
