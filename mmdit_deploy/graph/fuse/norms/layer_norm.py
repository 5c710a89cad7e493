"""LayerNorm (Ba et al. 2016, arXiv:1607.06450), where an exporter wrote it out, as TorchScript does before opset 17.

    d = x − mean(x)
    d / √(mean(d²) + ε)              ⇒   LayerNormalization(x, ones)
    Cast16(Cast64(d) / √(…))         ⇒   LayerNormalization(x, ones)       as TorchScript has it in fp16
    RMSNormalization(d, w)           ⇒   LayerNormalization(x, w)          as onnxscript leaves it at opset 23

x is in the type in which the mean is subtracted: `norm_weights` takes weight, bias and casts in. Where scale and shift
are computed (AdaLN) they stay outside.

Exact, but for the order of sums: where all is spelled in fp32.
Off by roundings to 16 bits: what is spelled in 16 bits, all of it or some. The op computes in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter.pattern import MatchResult, RewriteRule, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.norms.spelled_norm import (
    SPELLINGS,
    STASH,
    keeps_numbers,
    keeps_shape,
    last_axes,
    made_by,
    mean_of,
    mean_square,
    normalized_shape,
    ones,
    same,
    uncast,
    under_root,
)
from mmdit_deploy.graph.passes import Pass, like, rule_pass


@dataclass(frozen=True)
class _Deviation:
    """x − mean(x), over the last axes."""

    x: ir.Value
    axis: int


@dataclass(frozen=True)
class _LayerNorm:
    """What LayerNormalization takes."""

    x: ir.Value
    axis: int
    epsilon: float


def subtracts_mean(value: ir.Value | None) -> ir.Node | None:
    """The node x − mean(x) that makes a value, whatever the mean is over."""
    sub = made_by(uncast(value), "Sub")
    mean = None if sub is None else mean_of(sub.inputs[1])
    if sub is None or mean is None or mean.op_type != "ReduceMean" or not same(sub.inputs[0], mean.inputs[0]):
        return None
    return sub


def _deviation(value: ir.Value | None) -> _Deviation | None:
    sub = subtracts_mean(value)
    if sub is None:
        return None
    x, subtracted = sub.inputs
    mean = mean_of(subtracted)
    assert x is not None and subtracted is not None and mean is not None
    return _Deviation(x, last_axes(mean, subtracted, x))


def _read(x: ir.Value, other: ir.Value, normed: ir.Value) -> _LayerNorm | None:
    if subtracts_mean(x) is None or (under := under_root(normed, other)) is None:
        return None
    deviation, variance = _deviation(x), mean_square(under, x)
    if variance is None:
        raise MatchFailureError("the variance is not a mean of squares, as an unbiased one is not", under)
    again = _deviation(variance.x)
    if deviation is None or again is None or not same(again.x, deviation.x):
        raise MatchFailureError("the variance is of another value", variance.x)
    if not again.axis == deviation.axis == variance.axis:
        raise MatchFailureError("mean and variance are over different axes", under)
    keeps_shape(normed, deviation.x)
    keeps_numbers(deviation.x, x, other, variance.epsilon)
    normalized_shape(deviation.x, deviation.axis)
    return _LayerNorm(deviation.x, deviation.axis, variance.epsilon)


def _check(context: Any, x: Any, other: Any, normed: Any, cast: Any = None, **_: Any) -> MatchResult:
    read = _read(x, other, normed)
    if read is None:
        return MatchResult().fail()  # some other product or quotient
    if read.x.dtype != (normed if cast is None else cast).dtype:
        return MatchResult().fail("it is left in another type than that in which the mean is subtracted", normed)
    return MatchResult()


def _rewrite(op: Any, x: Any, other: Any, normed: Any, **_: Any) -> Any:
    read = _read(x, other, normed)
    assert read is not None
    weight = ones(op, read.x, normalized_shape(read.x, read.axis))
    return op.LayerNormalization(read.x, weight, axis=read.axis, epsilon=read.epsilon, stash_type=STASH)


def _cast(spelling: Callable[..., Any]) -> Callable[..., Any]:
    def pattern(op: Any, x: Any, other: Any) -> Any:
        return op.Cast(spelling(op, x, other), _allow_other_attributes=True, _outputs=["cast"])

    return pattern


class _OfDeviation(RewriteRuleClassBase):
    """RMSNormalization(d, w), where w may be of another type, which is that of the result."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.RMSNormalization(x, weight, _allow_other_attributes=True, _outputs=["normed"])

    def check(self, op: Any, x: Any, weight: Any, normed: Any, **_: Any) -> MatchResult:
        result = MatchResult()
        attributes = normed.producer().attributes
        if x.shape is None or subtracts_mean(x) is None or any(a.is_ref() for a in attributes.values()):
            return result.fail()  # an RMSNorm
        deviation, axis = _deviation(x), attributes.get_int("axis", -1)
        if deviation is None or deviation.axis != (axis if axis < 0 else axis - len(x.shape)):
            return result.fail("mean and variance are over different axes", x)
        if not x.dtype == deviation.x.dtype in (weight.dtype, ir.DataType.FLOAT):
            return result.fail("the deviation is cast before it is divided", x)
        return result

    def rewrite(self, op: Any, x: Any, weight: Any, normed: Any, **_: Any) -> Any:
        deviation, attributes = _deviation(x), normed.producer().attributes
        assert deviation is not None
        if weight.dtype == x.dtype:
            return op.LayerNormalization(deviation.x, weight, **attributes)
        wide = like(op.Cast(weight, to=x.dtype), x, weight.shape)
        made = like(op.LayerNormalization(deviation.x, wide, **attributes), x, x.shape)
        return op.Cast(made, to=weight.dtype)


layer_norm: Pass = rule_pass(
    "LayerNorm",
    *(
        RewriteRule(pattern, _rewrite, _check, remove_nodes=False)
        for spelling in SPELLINGS
        for pattern in (spelling, _cast(spelling))
    ),
    _OfDeviation.rule(),
)
