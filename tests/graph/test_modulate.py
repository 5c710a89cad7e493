"""AdaLN's modulation, in every spelling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mmdit_deploy.graph.fuse import FUSE, PREPARE
from mmdit_deploy.graph.fuse.modulate import modulate
from mmdit_deploy.graph.passes import Pass, run

SUBJECT = "modulate"
# Norms may come in pieces: what finds them comes before.
BEFORE: tuple[Pass, ...] = FUSE[: FUSE.index(modulate)]

NORMED = "n = LayerNormalization(x, w)"
NEAR_MISSES = {
    "not added to 1": (f"{NORMED} m = Mul(n, scale) y = Add(m, shift)", "the scale is not added to 1 (scale)"),
    "added to 2": (f"{NORMED} f = Add(scale, two) m = Mul(n, f) y = Add(m, shift)", "the scale is not added to 1 (f)"),
    "added to almost 1": (
        f"{NORMED} c = Constant<value_float = 1.0009>() f = Add(scale, c) m = Mul(n, f) y = Add(m, shift)",
        "the scale is not added to 1 (f)",
    ),
    "added to eight ones": (
        f"{NORMED} c = Constant<value = float[8] {{1,1,1,1,1,1,1,1}}>() f = Add(scale, c) m = Mul(n, f) "
        "y = Add(m, shift)",
        "the scale is not added to 1 (f)",
    ),
    "added to a 1 of more axes, and turned": (
        f"{NORMED} a = Constant<value_ints = [1]>() q = Squeeze(scale, a) c = Constant<value = float[1,1,1] {{1}}>() "
        "p = Add(q, c) f = Transpose<perm = [1,0,2]>(p) m = Mul(n, f) y = Add(m, shift)",
        "the scale is not added to 1 (f)",
    ),
    "no shift": (f"{NORMED} f = Add(scale, one) y = Mul(n, f)", "no shift is added (y)"),
    "no norm": ("f = Add(scale, one) m = Mul(x, f) y = Add(m, shift)", "what is modulated is not a norm (x)"),
    "a scale for all": (
        f"{NORMED} f = Add(w, one) m = Mul(n, f) y = Add(m, shift)",
        "the scale is not one vector per sample or token (f)",
    ),
    "a shift for all": (
        f"{NORMED} f = Add(scale, one) m = Mul(n, f) y = Add(m, w)",
        "the shift is the same for all samples (w)",
    ),
    "a number per sample": (
        f"{NORMED} r = ReduceMean<keepdims=1>(scale, last) f = Add(r, one) m = Mul(n, f) y = Add(m, shift)",
        "the scale is not one vector per sample or token (f)",
    ),
    "1 added in another type": (
        f"{NORMED} h = Cast<to=10>(scale) f = Add(h, half_one) g = Cast<to=1>(f) m = Mul(n, g) y = Add(m, shift)",
        "1 + scale is computed in another type (g)",
    ),
    "a norm's own weight and bias": (f"{NORMED} m = Mul(n, w) y = Add(m, w)", None),
    "a residual": ("m = Mul(x, scale) y = Add(m, x)", None),
}


def graph(body: str) -> str:
    return f"""g (float[B,N,8] x, float[B,1,8] scale, float[B,1,8] shift) => (float[B,N,8] y)
        <float[8] w = {{1,2,3,4,5,6,7,8}}, float[1] one = {{1}}, float two = {{2}}, float16 half_one = {{15360}},
         int64[1] last = {{2}}> {{ {body} }}"""


def test_every_spelling(spelling: object, check_spelling: Callable[..., None]) -> None:
    miss = not any(spelling.expect.values())  # type: ignore[attr-defined]
    half = spelling.path.name.startswith("fp")  # type: ignore[attr-defined]
    # The modulation is the same to the bit; a norm in one piece rounds its result once, and not at every step.
    tolerance = {"rtol": 5e-3, "atol": 5e-3} if half else {"rtol": 2e-4, "atol": 2e-5}
    check_spelling(spelling, (modulate,) if miss else (*BEFORE, modulate), **tolerance)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    body, reason = NEAR_MISSES[name]
    assert reasons_left(graph(body), (modulate,)) == ([] if reason is None else [reason])


def test_the_axis_of_tokens_is_given_after_one_is_added() -> None:
    """`(1 + scale)[:, None]`: the function gets the scale with its axis, and no 1."""
    text = """g (float[B,N,8] x, float[B,8] scale, float[B,1,8] shift) => (float[B,N,8] y)
        <float[8] w = {1,1,1,1,1,1,1,1}, float one = {1}, int64[1] axis = {1}> {
          n = LayerNormalization(x, w)
          f = Add(one, scale)
          u = Unsqueeze(f, axis)
          m = Mul(n, u)
          y = Add(m, shift)
        }"""
    proto = onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 23]>\n' + text)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    run(model, PREPARE)
    assert modulate.apply(model) == 1
    assert Counter(n.op_type for n in model.graph) == {"LayerNormalization": 1, "Unsqueeze": 1, "MMDiTModulate": 1}
    (unsqueeze,) = [n for n in model.graph if n.op_type == "Unsqueeze"]
    assert unsqueeze.inputs[0] is model.graph.inputs[1]
    assert list(unsqueeze.outputs[0].shape or ())[1:] == [1, 8]
    assert np.all([v.type is not None for n in model.graph for v in n.outputs])
