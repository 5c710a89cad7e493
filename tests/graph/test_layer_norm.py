"""LayerNorm: every spelling becomes one op; what modulates it stays outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mmdit_deploy.graph.fuse import PREPARE
from mmdit_deploy.graph.fuse.norms.layer_norm import layer_norm
from mmdit_deploy.graph.fuse.norms.norm_casts import norm_casts
from mmdit_deploy.graph.fuse.norms.norm_weights import norm_weights
from mmdit_deploy.graph.fuse.norms.rms_norm import rms_norm
from mmdit_deploy.graph.fuse.norms.zero_bias import zero_bias
from mmdit_deploy.graph.passes import run

SUBJECT = "layer_norm"
FIXTURES = Path(__file__).parent / "fixtures" / SUBJECT
PASSES = (layer_norm, rms_norm, norm_weights, norm_casts)
# Of 1 + scale, of products and sums in fp16, and of the mean, which TorchScript subtracts in fp16.
HALF = {"rtol": 4 * 2**-10, "atol": 4 * 2**-10}
# At opset 23 onnxscript makes an RMSNormalization of the deviation, which is fp32, and a weight that is fp16: right by
# the op's definition, and more than any runtime takes.
TWO_TYPES = "upcast_fp16.dynamo-23.onnx"
MODULATED = ("continuous", "zero")
BIASED = ("torch", "torch_fp16", "torch_two_axes", "fp32_of_fp16", "papers", "upcast_fp16")


def graph(body: str, dtype: str = "float") -> str:
    return f"""g ({dtype}[B,N,8] x, float[B,1,8] scale, float[B,1,8] shift) => ({dtype}[B,N,8] y)
        <float[8] w = {{1,2,3,4,5,6,7,8}}, float[8] b = {{8,7,6,5,4,3,2,1}}, float two = {{2}}, float one = {{1}},
         float eps = {{0.01}}, int64[1] last = {{-1}}, int64[1] second = {{1}}> {{ {body} }}"""


DEVIATION = "m = ReduceMean(x, last) d = Sub(x, m)"
NORM = f"{DEVIATION} q = Pow(d, two) v = ReduceMean(q, last) s = Add(v, eps) r = Sqrt(s) n = Div(d, r)"

SPELLINGS = {
    "weight and bias": (f"{NORM} k = Mul(w, n) y = Add(b, k)", {"LayerNormalization": 1}),
    "the mean twice": (
        f"{NORM} y = Mul(n, w)".replace("q = Pow(d", "m2 = ReduceMean(x, last) d2 = Sub(x, m2) q = Pow(d2"),
        {"LayerNormalization": 1},
    ),
    "a reciprocal": (
        NORM.replace("n = Div(d, r)", "i = Reciprocal(r) n = Mul(i, d)") + " y = Add(n, b)",
        {"LayerNormalization": 1, "Constant": 1},
    ),
    "modulated": (
        f"{NORM} f = Add(one, scale) k = Mul(n, f) y = Add(k, shift)",
        {"LayerNormalization": 1, "Constant": 1, "Add": 2, "Mul": 1},
    ),
    "modulated after its weight": (
        f"{NORM} a = Mul(n, w) o = Add(a, b) f = Add(one, scale) k = Mul(o, f) y = Add(k, shift)",
        {"LayerNormalization": 1, "Add": 2, "Mul": 1},
    ),
    "a bias that is a shift": (f"{NORM} y = Add(n, shift)", {"LayerNormalization": 1, "Constant": 1, "Add": 1}),
    "two biases": (f"{NORM} a = Add(n, b) y = Add(a, w)", {"LayerNormalization": 1, "Constant": 1, "Add": 1}),
    "an RMSNorm of the deviation": (
        f"{DEVIATION} n = RMSNormalization<epsilon=0.01>(d, w) y = Add(n, b)",
        {"LayerNormalization": 1},
    ),
}

OVER_TOKENS = NORM.replace("last", "second") + " y = Mul(n, w)"
STAYS = {
    "over tokens": (OVER_TOKENS, "the mean is not over the last axes (ReduceMean → m)"),
    "mean and variance over different axes": (
        NORM.replace("v = ReduceMean(q, last)", "v = ReduceMean(q, second)") + " y = Mul(n, w)",
        "the mean is not over the last axes (ReduceMean → v)",
    ),
    "unbiased": (
        NORM.replace("s = Add(v, eps)", "u = Mul(v, two) s = Add(u, eps)") + " y = Mul(n, w)",
        "the variance is not a mean of squares, as an unbiased one is not (s)",
    ),
    "epsilon outside": (
        f"{DEVIATION} q = Mul(d, d) v = ReduceMean(q, last) r = Sqrt(v) s = Add(r, eps) n = Div(d, s) y = Mul(n, w)",
        "epsilon is added to the root, not under it (Add → s)",
    ),
    "the variance of another value": (
        NORM.replace("q = Pow(d", "a = Abs(d) q = Pow(a") + " y = Mul(n, w)",
        "the variance is of another value (a)",
    ),
    "of squares of x": (
        NORM.replace("q = Pow(d", "q = Pow(x") + " y = Mul(n, w)",
        "the variance is of another value (x)",
    ),
    "epsilon of more axes": (
        "e = Constant<value = float[1,1,1,1] {0.01}>() a = Constant<value_ints = [0]>() "
        + NORM.replace("eps", "e")
        + " k = Squeeze(n, a) y = Mul(k, w)",
        "a constant adds axes (n)",
    ),
    "the variance rounded": (
        NORM.replace("s = Add(v, eps)", "h = Cast<to=10>(v) f = Cast<to=1>(h) s = Add(f, eps)") + " y = Mul(n, w)",
        "it is rounded to FLOAT16 inside (Cast → h)",
    ),
    "a deviation alone": (f"{DEVIATION} y = Mul(d, w)", None),
    "divided by another root": (
        f"{DEVIATION} a = Abs(scale) r = Sqrt(a) y = Div(d, r)",
        "the variance is not a mean of squares, as an unbiased one is not (a)",
    ),
}


def test_every_spelling(spelling: Any, check_spelling: Callable[..., None]) -> None:
    if spelling.path.name == TWO_TYPES:
        pytest.skip("no runtime takes what torch writes; the next test is about it")
    check_spelling(spelling, PASSES, **(HALF if "fp16" in spelling.path.name else {}))


def test_a_weight_of_another_type_than_the_deviation() -> None:
    """At opset 23 it comes to what torch writes at opset 17."""
    norms = []
    for opset in ("17", "23"):
        model = ir.load(FIXTURES / TWO_TYPES.replace("23", opset))
        run(model, (*PREPARE, *PASSES))
        (norm,) = model.graph
        inputs = [v.name for v in norm.inputs if v is not None]
        norms.append((norm.op_type, inputs, {name: a.value for name, a in norm.attributes.items()}))
    assert norms[0] == norms[1]


def test_nothing_but_the_norm_is_left(spelling: Any) -> None:
    """Weight, bias and casts are inside."""
    case = spelling.path.name.split(".")[0]
    if not any(spelling.expect.values()) or case.startswith(MODULATED):
        return
    model = ir.from_proto(onnx.load(spelling.path))
    run(model, (*PREPARE, *PASSES))
    (norm,) = (n for n in model.graph if n.op_type != "Constant")
    if case in BIASED:
        assert len(norm.inputs) == 3
    assert len({v.dtype for v in (*norm.inputs, *norm.outputs) if v is not None}) == 1
    assert norm.attributes.get_int("stash_type", 1) == ir.DataType.FLOAT


@pytest.mark.parametrize("name", SPELLINGS)
def test_by_hand(name: str, fused: Callable[..., ir.Model]) -> None:
    body, left = SPELLINGS[name]
    assert Counter(n.op_type for n in fused(graph(body), PASSES).graph) == left


@pytest.mark.parametrize("name", STAYS)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    """Nor does the rule for RMSNorm take it: of the deviation that would be right, and surprising."""
    body, reason = STAYS[name]
    assert reasons_left(graph(body), PASSES) == ([] if reason is None else [reason])


def test_a_modulation_of_one_sample_is_no_weight(fused: Callable[..., ir.Model]) -> None:
    """Where the batch is 1 it has a weight's shape."""
    body, left = SPELLINGS["modulated"]
    model = fused(graph(body).replace("[B,", "[1,"), PASSES)
    assert Counter(n.op_type for n in model.graph) == left


def test_in_a_local_function(fused: Callable[..., ir.Model]) -> None:
    text = f"""g (float[B,N,8] x) => (float[B,N,8] y) <float[8] w = {{1,2,3,4,5,6,7,8}}> {{ y = local.Norm(x, w) }}
        <domain: "local", opset_import: ["": 23]>
        Norm (x, w) => (y) {{
          last = Constant<value_ints = [-1]>()
          eps = Constant<value_float = 0.01>()
          two = Constant<value_float = 2.0>()
          {NORM} k = Mul(n, w) y = Add(k, w)
        }}"""
    (norm,) = fused(text, PASSES).functions.values()
    assert Counter(n.op_type for n in norm) == {"LayerNormalization": 1}


def test_mean_in_fp16_and_quotient_in_fp64(fused: Callable[..., ir.Model]) -> None:
    """TorchScript's fp16, by hand; where it is left in fp64 it stays."""
    body = """m = ReduceMean(x, last) d = Sub(x, m) e = Cast<to=11>(d)
        two2 = Cast<to=11>(two) q = Pow(e, two2) v = ReduceMean(q, last)
        eps2 = Cast<to=11>(eps) s = Add(v, eps2) r = Sqrt(s) n = Div(e, r) END"""
    back = fused(graph(body.replace("END", "y = Cast<to=10>(n)"), "float16"), PASSES, **HALF)
    assert Counter(n.op_type for n in back.graph) == {"LayerNormalization": 1, "Constant": 1}
    kept = graph(body.replace("END", "y = Identity(n)"), "float16").replace("(float16[B,N,8] y)", "(double[B,N,8] y)")
    model = fused(kept, PASSES)
    assert not any(n.op_type == "LayerNormalization" for n in model.graph)
    (left,) = layer_norm.left(model)
    assert left.reason == "it is left in another type than that in which the mean is subtracted (n)"


@pytest.mark.parametrize(("bias", "fires"), [("0, 0, 0, 0", 1), ("0, 0, 0, 1", 0)])
def test_a_bias_of_zeros_goes(bias: str, fires: int) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(f"""<ir_version: 11, opset_import: ["": 23]>
        g (float[B, 4] x) => (float[B, 4] y) <float[4] w = {{1, 2, 3, 4}}, float[4] b = {{{bias}}}> {{
          y = LayerNormalization <epsilon = 1e-3> (x, w, b)
        }}""")
    )
    assert zero_bias.apply(model) == fires
    (node,) = model.graph
    assert len(node.inputs) == 3 - fires and node.attributes["epsilon"].as_float() == np.float32(1e-3)
    assert not zero_bias.left(model)
    assert zero_bias.apply(model) == 0
