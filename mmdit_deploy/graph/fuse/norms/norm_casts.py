"""A norm in one type, the one that it is wanted in.

    Cast16(norm(Cast32(x), w, b))       ⇒   norm(x, Cast16(w), Cast16(b))     where w and b are exact in 16 bits
    RMSNormalization(x16, w32)          ⇒   RMSNormalization(Cast32(x16), w32)
    RMSNormalization(x32, w16)          ⇒   Cast16(RMSNormalization(x32, Cast32(w16)))

The ops compute in fp32 inside and round to x's type before the weight.

Exact: the first, where the weight is ones and there is no bias.
Off by roundings to 16 bits: the first otherwise, which rounds before the weight, and before the bias, too; the second
and third, which round after the weight, if at all, and no more before it.

Weight and x of two types are in the op's definition, and as torch writes it, but its own function body multiplies the
two, which no runtime does.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.norms.norm_parameters import in_type
from mmdit_deploy.graph.fuse.norms.norm_weights import a_norm, norm_again, read_elsewhere
from mmdit_deploy.graph.fuse.norms.spelled_norm import HALF, STASH
from mmdit_deploy.graph.passes import Pass, like, rule_pass

_FLOAT = ir.DataType.FLOAT


class _Narrow(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        wide = op.Cast(x, _allow_other_attributes=True)
        return op.Cast(a_norm(op, wide, weight), _allow_other_attributes=True, _outputs=["cast"])

    def check(self, op: Any, x: Any, normed: Any, cast: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        norm = normed.producer()
        stash = norm.attributes.get("stash_type")
        if normed.dtype != _FLOAT or x.dtype not in HALF or cast.dtype != x.dtype:
            return result.fail()
        if stash is not None and (stash.is_ref() or stash.as_int() != STASH):
            return result.fail("not computed in fp32", norm)
        if read_elsewhere(normed):
            return result.fail("the norm is read in fp32 too", normed)
        for parameter in norm.inputs[1:]:
            if parameter is not None and in_type(parameter, x.dtype) is None:
                return result.fail(f"it has numbers that {x.dtype.name} has not", parameter)
        return result

    def rewrite(self, op: Any, x: Any, normed: Any, **_: Any) -> Any:
        made: list[ir.Value | None] = []
        for parameter in normed.producer().inputs[1:]:
            found = None if parameter is None else in_type(parameter, x.dtype)
            if found is not None and not isinstance(found, ir.Value):
                found = like(op.Constant(value=found), x, parameter.shape)
            made.append(found)
        return norm_again(op, normed, x, *made)


class _OneType(RewriteRuleClassBase):
    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.RMSNormalization(x, weight, _allow_other_attributes=True, _outputs=["normed"])

    def check(self, op: Any, x: Any, weight: Any, **_: Any) -> MatchResult:
        types = {x.dtype, weight.dtype}
        return MatchResult() if len(types) == 2 and types <= {_FLOAT, *HALF} else MatchResult().fail()

    def rewrite(self, op: Any, x: Any, weight: Any, normed: Any, **_: Any) -> Any:
        made = norm_again(op, normed, *(_widened(op, value) for value in (x, weight)))
        made.type, made.shape = ir.TensorType(_FLOAT), normed.shape
        return made if weight.dtype == _FLOAT else op.Cast(made, to=weight.dtype)


def _widened(op: Any, value: ir.Value) -> ir.Value:
    if value.dtype == _FLOAT:
        return value
    wide: ir.Value = op.Cast(value, to=_FLOAT)
    wide.type, wide.shape = ir.TensorType(_FLOAT), value.shape
    return wide


norm_casts: Pass = rule_pass("norm casts", _Narrow.rule(), _OneType.rule())
