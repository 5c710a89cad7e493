"""GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    x/2 · (1 + Erf(x/√2))                         ⇒   Gelu(x)
    x/2 · (1 + Tanh(√(2/π) · (x + 0.044715 x³)))  ⇒   Gelu<approximate="tanh">(x)

Factors in any order, halved anywhere by a product or a quotient; the polynomial in any form. x · Sigmoid(1.702 x)
(QuickGELU) is another function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from mmdit_deploy.graph.fuse.known_values import number
from mmdit_deploy.graph.fuse.norms.spelled_norm import made_by
from mmdit_deploy.graph.fuse.polynomial import Coefficients, polynomial
from mmdit_deploy.graph.passes import Pass, rule_pass

_SLOPE = math.sqrt(2 / math.pi)
# What is inside of each, and the op's name for it.
_INSIDE: dict[str, tuple[Coefficients, str]] = {
    "Erf": ({1: math.sqrt(0.5)}, "none"),
    "Tanh": ({1: _SLOPE, 3: 0.044715 * _SLOPE}, "tanh"),
}
# How far constants may be off, by the type they are in: in 16 bits what rounding two of them can do (half a unit in the
# last place of 11 and 8 bits each), in fp32 what five written digits can (0.70711, 1.41421).
_TOLERANCE = {ir.DataType.FLOAT16: 2**-10, ir.DataType.BFLOAT16: 2**-7}
_DIGITS = 1e-5
_DEEP = 4  # nodes from the last product to Erf or Tanh


class _Gelu(RewriteRuleClassBase):
    def __init__(self, op_type: str) -> None:
        super().__init__(remove_nodes=False)
        self.op_type = op_type

    def pattern(self, op: Any, left: Any, right: Any) -> Any:
        return getattr(op, self.op_type)(left, right, _outputs=["product"])

    def check(self, op: Any, product: Any, **_: Any) -> MatchResult:
        return MatchResult() if _read(product) else MatchResult().fail()  # some other product

    def rewrite(self, op: Any, product: Any, **_: Any) -> Any:
        read = _read(product)
        assert read is not None
        x, approximate = read
        return op.Gelu(x, approximate=approximate)


def _read(product: ir.Value) -> tuple[ir.Value, str] | None:
    """What a product is the GELU of, and which one."""
    if not _has_curve(product, _DEEP):
        return None
    for x, factor, curve in _splits(product):
        inside, name = _INSIDE[curve.op_type]
        found = polynomial(curve.inputs[0], x)
        halved, fits = math.isclose(factor, 0.5), _fits(found, inside, x.dtype)
        if halved and fits and _rank(x) == _rank(product):
            return x, name
        if fits:
            raise MatchFailureError("it is not halved", curve)
        if halved:
            raise MatchFailureError(f"{curve.op_type} is of {_shown(found)}, not of {_shown(inside)}", curve)
    return None


def _splits(product: ir.Value) -> Iterator[tuple[ir.Value, float, ir.Node]]:
    """A product of x, a number and 1 + curve: every way to read it so."""
    whole, scale = _scaled(product)
    node = made_by(whole, "Mul")
    for left, right in (node.inputs, reversed(node.inputs)) if node is not None else ():
        if left is None or right is None:
            continue
        plus_one, inner = _scaled(right)
        if (curve := _curve(plus_one)) is None:
            continue
        x, outer = _scaled(left)
        yield x, scale * inner * outer, curve
        if x is not left:
            yield left, scale * inner, curve  # a product is what is activated


def _scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """A value without the number that it is multiplied with or divided by, and that number."""
    node = made_by(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    left, right = node.inputs
    if left is not None and (factor := number(right)):
        return left, factor if node.op_type == "Mul" else 1 / factor
    if right is not None and node.op_type == "Mul" and (factor := number(left)):
        return right, factor
    return value, 1.0


def _curve(value: ir.Value) -> ir.Node | None:
    """Erf or Tanh, to which 1 is added."""
    add = made_by(value, "Add")
    for one, curve in (add.inputs, reversed(add.inputs)) if add is not None else ():
        if (node := made_by(curve, *_INSIDE)) is not None and number(one) == 1:
            return node
    return None


def _fits(found: Coefficients | None, wanted: Coefficients, dtype: ir.DataType | None) -> bool:
    if found is None or {power for power, c in found.items() if c} != set(wanted):
        return False
    tolerance = _DIGITS if dtype is None else _TOLERANCE.get(dtype, _DIGITS)
    return all(math.isclose(found[power], c, rel_tol=tolerance) for power, c in wanted.items())


def _shown(polynomial: Coefficients | None) -> str:
    """For people: 0.7979·x + 0.03568·x^3."""
    if polynomial is None:
        return "something else than x"
    return " + ".join(f"{c:.4g}·x" + (f"^{power}" if power > 1 else "") for power, c in sorted(polynomial.items()))


def _has_curve(value: ir.Value | None, depth: int) -> bool:
    node = made_by(value, "Add", "Div", "Mul", *_INSIDE) if depth else None
    if node is None:
        return False
    return node.op_type in _INSIDE or any(_has_curve(v, depth - 1) for v in node.inputs)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


gelu: Pass = rule_pass("GELU", _Gelu.rule("Mul"), _Gelu.rule("Div"))
