"""A norm's weight and bias, inside it.

    norm(x, ones) · w              ⇒   norm(x, w)
    norm(x, w) + b                 ⇒   norm(x, w, b)                   LayerNormalization only
    Cast16(norm(x, ones)) · w      ⇒   Cast16(norm(x, Cast32(w)))      and so with b
    norm(x, ConstantOfShape(…))    ⇒   norm(x, ones)                   as torch writes a norm without weight

Exact: the fourth; and the first two in fp32, and in 16 bits as the ops are defined: they round before the weight. A
runtime that rounds only after it is off by one rounding, to the better.
Off by one rounding to 16 bits: the third, which rounds once instead of twice.

A modulation is no weight.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, OrValue, RewriteRuleClassBase

from mmdit_deploy.graph.attributes import given_by_call
from mmdit_deploy.graph.fuse.norms.norm_parameters import is_ones, parameter_of
from mmdit_deploy.graph.fuse.norms.spelled_norm import HALF, normalized_shape, ones
from mmdit_deploy.graph.passes import Pass, like, rule_pass

NORMS = ("LayerNormalization", "RMSNormalization")
_ANY = {"_allow_other_attributes": True, "_allow_other_inputs": True}


def a_norm(op: Any, x: Any, weight: Any) -> Any:
    """A pattern: either norm, with or without a bias."""
    return OrValue([getattr(op, name)(x, weight, **_ANY) for name in NORMS], name="normed")


def norm_again(op: Any, normed: ir.Value, *inputs: ir.Value | None) -> Any:
    """The same norm of other inputs."""
    node = normed.producer()
    assert node is not None
    return getattr(op, node.op_type)(*inputs, **node.attributes)


def read_elsewhere(value: ir.Value) -> bool:
    """Whether a value would have to stay, next to one that is made from it."""
    return value.is_graph_output() or len(value.uses()) > 1


class _Parameter(RewriteRuleClassBase):
    """A weight, by Mul, or a bias, by Add; after a cast or not."""

    def __init__(self, op_type: str, *, cast: bool) -> None:
        super().__init__(remove_nodes=False)
        self.op_type, self.after_cast = op_type, cast

    def pattern(self, op: Any, x: Any, weight: Any, parameter: Any) -> Any:
        normed = a_norm(op, x, weight)
        if self.after_cast:
            normed = op.Cast(normed, _allow_other_attributes=True, _outputs=["cast"])
        return getattr(op, self.op_type)(normed, parameter)

    def check(self, op: Any, weight: Any, parameter: Any, normed: Any, cast: Any = None, **_: Any) -> MatchResult:
        result = MatchResult()
        if not self._lacks_it(normed.producer(), weight) or _read(parameter, normed, cast) is None:
            return result.fail()  # it has its own, or what follows is no weight
        if read_elsewhere(normed) or (cast is not None and read_elsewhere(cast)):
            return result.fail("the norm is read without its weight too", normed)
        return result

    def rewrite(self, op: Any, x: Any, weight: Any, parameter: Any, normed: Any, cast: Any = None, **_: Any) -> Any:
        found = _read(parameter, normed, cast)
        assert found is not None
        shape = list(normed.shape[_axis(normed) :])
        if list(found.shape or ()) != shape:
            to = op.Constant(value=ir.tensor(shape, dtype=ir.DataType.INT64))
            found = like(op.Reshape(found, to), found, shape)
        if cast is not None:
            found = like(op.Cast(found, to=normed.dtype), normed, shape)
        made = norm_again(op, normed, x, *((found,) if self.op_type == "Mul" else (weight, found)))
        return made if cast is None else op.Cast(like(made, normed, normed.shape), to=cast.dtype)

    def _lacks_it(self, norm: ir.Node, weight: ir.Value) -> bool:
        if len(norm.inputs) > 2 and norm.inputs[2] is not None:
            return False
        if any(attribute.is_ref() for attribute in norm.attributes.values()):
            return False
        return is_ones(weight) if self.op_type == "Mul" else norm.op_type == "LayerNormalization"


def _read(parameter: ir.Value, normed: ir.Value, cast: ir.Value | None) -> ir.Value | None:
    types = normed.dtype, None if cast is None else cast.dtype
    if cast is not None and types not in [(ir.DataType.FLOAT, half) for half in HALF]:
        return None
    return None if normed.shape is None else parameter_of(parameter, normed, _axis(normed))


def _axis(normed: ir.Value) -> int:
    """The first normalized axis, counted from the end."""
    node = normed.producer()
    assert node is not None and normed.shape is not None
    axis = node.attributes.get_int("axis", -1)
    return axis if axis < 0 else axis - len(normed.shape)


class _OnesOfAllAxes(RewriteRuleClassBase):
    """A weight of ones that is as large as x would be read like x."""

    def __init__(self, name: str) -> None:
        super().__init__(remove_nodes=False)
        self.norm = name

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        filled = op.ConstantOfShape(shape, _allow_other_attributes=True, _outputs=["filled"])
        return getattr(op, self.norm)(x, filled, **_ANY, _outputs=["normed"])

    def check(self, op: Any, x: Any, filled: Any, normed: Any, **_: Any) -> MatchResult:
        value = filled.producer().attributes.get_tensor("value")
        unknown = given_by_call(normed.producer()) is not None
        if unknown or value is None or value.numpy().item() != 1 or normed.shape is None:
            return MatchResult().fail()
        normalized_shape(x, _axis(normed))
        return MatchResult()

    def rewrite(self, op: Any, x: Any, filled: Any, normed: Any, **_: Any) -> Any:
        weight = ones(op, filled, normalized_shape(x, _axis(normed)))
        return norm_again(op, normed, x, weight, *normed.producer().inputs[2:])


norm_weights: Pass = rule_pass(
    "norm weights",
    *(_OnesOfAllAxes.rule(name) for name in NORMS),
    *(
        rule
        for op_type in ("Mul", "Add")
        for cast in (False, True)
        for rule in _Parameter.rule(op_type, cast=cast).commute()
    ),
)
