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
