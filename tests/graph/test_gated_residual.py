"""Gated residuals, in every spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmdit_deploy.graph.fuse.gated_residual import gated_residual

SUBJECT = "gated_residual"
NEAR_MISSES = {
    "a layer scale": ("m = Mul(y, w) out = Add(x, m)", "the gate is the same for all samples (w)"),
    "of each token": (
        "g = Sigmoid(x) m = Mul(g, y) out = Add(x, m)",
        "the gate is of each token and channel, and not from the conditioning (g)",
    ),
    "a number per sample": (
        "r = ReduceMean<keepdims=1>(gate, last) m = Mul(r, y) out = Add(x, m)",
        "the gate is not one vector per sample (r)",
    ),
    "chosen among tokens": (
        "g = Where(chosen, x, y) m = Mul(g, y) out = Add(x, m)",
        "the gate is of each token and channel, and not from the conditioning (g)",
    ),
    "a number": ("m = Mul(y, half) out = Add(m, x)", None),
    "a bias": ("m = Mul(y, x) out = Add(m, gate)", None),
    "no residual": ("m = Mul(y, gate) out = Sub(m, x)", None),
}


def test_every_spelling(spelling: object, check_spelling: Callable[..., None]) -> None:
    check_spelling(spelling, (gated_residual,))


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    body, reason = NEAR_MISSES[name]
    text = f"""g (float[B,N,8] x, float[B,1,8] gate, float[B,N,8] y, bool[N,1] chosen) => (float[B,N,8] out)
        <float[8] w = {{1,2,3,4,5,6,7,8}}, float half = {{0.5}}, int64[1] last = {{2}}> {{ {body} }}"""
    assert reasons_left(text, (gated_residual,)) == ([] if reason is None else [reason])
