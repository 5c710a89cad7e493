"""A value as a polynomial of another, read from the graph.

Mul(0.8, Add(x, Mul(0.045, Pow(x, 3))))   reads as   {1: 0.8, 3: 0.036}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from mmdit_deploy.graph.fuse.known_values import number

Coefficients = Mapping[int, float]  # by power
_DEPTH = 8  # nodes on the way to x: more than a cubic needs in any spelling


def polynomial(value: ir.Value | None, x: ir.Value, depth: int = _DEPTH) -> Coefficients | None:
    """The coefficients of a value by power of x; None where it is no polynomial of x."""
    if value is x:
        return {1: 1.0}
    node = value.producer() if value is not None and depth else None
    if node is None or node.domain or node.op_type not in ("Add", "Div", "Identity", "Mul", "Pow"):
        constant = number(value)
        return None if constant is None else {0: constant}
    read = [polynomial(v, x, depth - 1) for v in node.inputs]
    if any(p is None for p in read):
        return None
    return _OF[node.op_type](*(p for p in read if p is not None))


def _sum(one: Coefficients, other: Coefficients) -> Coefficients:
    return {power: one.get(power, 0) + other.get(power, 0) for power in one.keys() | other.keys()}


def _product(one: Coefficients, other: Coefficients) -> Coefficients:
    made: dict[int, float] = {}
    for i, a in one.items():
        for j, b in other.items():
            made[i + j] = made.get(i + j, 0) + a * b
    return made


def _quotient(one: Coefficients, other: Coefficients) -> Coefficients | None:
    if set(other) != {0} or other[0] == 0:
        return None
    return {power: a / other[0] for power, a in one.items()}


def _power(base: Coefficients, exponent: Coefficients) -> Coefficients | None:
    times = exponent.get(0)
    if set(exponent) != {0} or times not in (1, 2, 3):
        return None
    made = base
    for _ in range(int(times) - 1):
        made = _product(made, base)
    return made


_OF: Mapping[str, Callable[..., Coefficients | None]] = {
    "Add": _sum,
    "Div": _quotient,
    "Identity": lambda p: p,
    "Mul": _product,
    "Pow": _power,
}
