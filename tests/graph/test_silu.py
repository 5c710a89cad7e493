"""SiLU, in every spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmdit_deploy.graph.fuse.silu import silu

SUBJECT = "silu"
NEAR_MISSES = {
    "QuickGELU": ("c = Constant<value_float = 1.702>() m = Mul(c, x) s = Sigmoid(m) y = Mul(x, s)", "QuickGELU (m)"),
    "another base": (
        "c = Constant<value_float = 2.0>() n = Neg(x) e = Exp(n) d = Add(c, e) y = Div(x, d)",
        "not 1 is added to the exponential (c)",
    ),
    "almost 1": (
        "c = Constant<value_float = 1.0009>() n = Neg(x) e = Exp(n) d = Add(e, c) y = Div(x, d)",
        "not 1 is added to the exponential (c)",
    ),
    "eight ones": (
        "c = Constant<value = float[8] {1,1,1,1,1,1,1,1}>() n = Neg(x) e = Exp(n) d = Add(e, c) y = Div(x, d)",
        "not 1 is added to the exponential (c)",
    ),
    "a 1 of four axes": (
        "c = Constant<value = float[1,1,1,1] {1}>() n = Neg(x) e = Exp(n) d = Add(e, c) f = Div(x, d) "
        "a = Constant<value_ints = [0]>() y = Squeeze(f, a)",
        "the 1 that is added has more axes than x (c)",
    ),
    "a gate": ("a = Abs(x) s = Sigmoid(a) y = Mul(x, s)", None),
    "not negated": ("c = Constant<value_float = 1.0>() e = Exp(x) d = Add(c, e) y = Div(x, d)", None),
}


def test_every_spelling(spelling: object, check_spelling: Callable[..., None]) -> None:
    check_spelling(spelling, (silu,))


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    body, reason = NEAR_MISSES[name]
    left = reasons_left(f"g (float[B,N,8] x) => (float[B,N,8] y) {{ {body} }}", (silu,))
    assert len(left) == (reason is not None)
    assert reason is None or left[0].endswith(reason)
