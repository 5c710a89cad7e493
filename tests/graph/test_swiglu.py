"""SwiGLU, in every spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmdit_deploy.graph.fuse.silu import silu
from mmdit_deploy.graph.fuse.swiglu import swiglu

SUBJECT = "swiglu"
NEAR_MISSES = {
    "one value per channel": (
        "m = ReduceMean(x, one) s = mmdit.MMDiTSiLU(m) y = Mul(s, x)",
        "the gate and the value are not of one shape (m, x)",
    ),
    "its own gate": ("s = mmdit.MMDiTSiLU(x) y = Mul(s, x)", "the gate and the value are one tensor (x)"),
    "another type": (
        "h = Cast<to=10>(x) s = mmdit.MMDiTSiLU(h) f = Cast<to=1>(s) a = Abs(x) y = Mul(a, f)",
        "the SiLU is of another type than the value (f)",
    ),
    "a number": ("c = Constant<value_float = 1.67>() s = mmdit.MMDiTSiLU(x) y = Mul(s, c)", None),
    "a sum": ("a = Abs(x) s = mmdit.MMDiTSiLU(x) y = Add(s, a)", None),
}


def test_every_spelling(spelling: object, check_spelling: Callable[..., None]) -> None:
    check_spelling(spelling, (silu, swiglu) if not is_near_miss(spelling) else (swiglu,))


def is_near_miss(spelling: object) -> bool:
    """Those have SiLUs to be found, and no SwiGLU: what finds SiLUs must not run."""
    return not any(spelling.expect.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    body, reason = NEAR_MISSES[name]
    text = f"g (float[B,N,8] x) => (float[B,N,8] y) <int64[1] one = {{1}}> {{ {body} }}"
    assert reasons_left(text, (swiglu,)) == ([] if reason is None else [reason])
