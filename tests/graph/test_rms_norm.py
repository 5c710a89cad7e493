"""RMSNorm: every spelling becomes one op, with the weight and in the type that it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from mmdit_deploy.graph.fuse import FUSE, PREPARE
from mmdit_deploy.graph.fuse.norms.layer_norm import layer_norm
from mmdit_deploy.graph.fuse.norms.norm_casts import norm_casts
from mmdit_deploy.graph.fuse.norms.norm_weights import norm_weights
from mmdit_deploy.graph.fuse.norms.rms_norm import rms_norm
from mmdit_deploy.graph.passes import run

SUBJECT = "rms_norm"
PASSES = (layer_norm, rms_norm, norm_weights, norm_casts)
# The op rounds to 16 bits before it multiplies by the weight, and the spellings here or there: two roundings.
HALF = {"rtol": 2 * 2**-10, "atol": 1e-5}
# A spelling whose squares, mean and root are rounded to fp16 too; the op is the more exact of the two.
ALL_HALF = {"rtol": 6 * 2**-10, "atol": 1e-3}
# ONNX Runtime refuses it before: x is fp16 and the weight fp32, as RMSNormalization's definition has it.
TWO_TYPES = "diffusers_fp32_weight.dynamo-23.onnx"
# What may be left around the norm.
AROUND = {
    "diffusers_bias": {"Add": 1},
    "diffusers_fp32_weight": {"Cast": 1},
    "heads": {"Shape": 2, "Concat": 1, "Reshape": 1},
    "heads_fp16": {"Shape": 2, "Concat": 1, "Reshape": 1},
}


def weighted(norm: str, *, dtype: str = "float", weight: str = "float[8] w = {1,2,3,4,5,6,7,8}") -> str:
    """A graph around a norm, with what its spellings need."""
    return f"""g ({dtype}[B,N,8] x, float[B,1,8] scale) => ({dtype}[B,N,8] y)
        <{weight}, float two = {{2}}, float one = {{1}}, float eps = {{0.01}}, float half = {{-0.5}},
         int64[1] last = {{-1}}, int64[1] third = {{2}}, int64[1] second = {{1}}, int64[2] both = {{-1,1}},
         int64[1] zero = {{0}}, float[1] many = {{0.01}}> {{ {norm} }}"""


NORM = "q = Mul(x, x) m = ReduceMean(q, last) s = Add(m, eps) r = Sqrt(s)"
FACTOR = f"{NORM} i = Reciprocal(r) n = Mul(x, i)"

UPCAST = f"f = Cast<to=1>(x) {FACTOR} k = Mul(n, w) y = Cast<to=10>(k)".replace("Mul(x, ", "Mul(f, ").replace(
    ", x)", ", f)"
)
HEADER = '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>\n'

SPELLINGS = {
    "epsilon first": "q = Pow(x, two) m = ReduceMean(q, last) s = Add(eps, m) r = Sqrt(s) n = Div(x, r) y = Mul(w, n)",
    "axis from the front": NORM.replace("last", "third") + " i = Div(one, r) n = Mul(i, x) y = Mul(n, w)",
    "axes computed": "u = Squeeze(last) v = Unsqueeze(u, zero) " + FACTOR.replace("last", "v") + " y = Mul(n, w)",
    "a power of minus a half": NORM.replace("r = Sqrt(s)", "i = Pow(s, half)") + " n = Mul(x, i) y = Mul(n, w)",
    "weight unsqueezed": f"{FACTOR} a = Constant<value_ints=[0,1]>() u = Unsqueeze(w, a) y = Mul(n, u)",
    "weight expanded": f"{FACTOR} a = Shape(x) u = Expand(w, a) y = Mul(n, u)",
    "weight copied": f"{FACTOR} u = Identity(w) y = Mul(u, n)",
    "one plus weight": f"{FACTOR} u = Add(one, w) y = Mul(n, u)",
}

_SUM = "a sum of squares, not their mean"
STAYS = {
    "over tokens": (
        FACTOR.replace("last", "second") + " y = Mul(n, w)",
        "the mean is not over the last axes (ReduceMean → m)",
    ),
    "over two axes, one of them dynamic": (
        FACTOR.replace("last", "both") + " y = Mul(n, w)",
        "the size of the normalized axes is not known (x)",
    ),
    "over all": (FACTOR.replace(", last", "") + " y = Mul(n, w)", "the mean is over all axes (ReduceMean → m)"),
    "a sum": (FACTOR.replace("ReduceMean", "ReduceSum") + " y = Mul(n, w)", f"{_SUM} (ReduceSum → m)"),
    "a sum of squares": (
        "m = ReduceSumSquare(x, last) s = Add(m, eps) r = Sqrt(s) n = Div(x, r) y = Mul(n, w)",
        f"{_SUM} (ReduceSumSquare → m)",
    ),
    "no epsilon": (
        "q = Mul(x, x) m = ReduceMean(q, last) r = Sqrt(m) n = Div(x, r) y = Mul(n, w)",
        "no epsilon is added to the mean square (ReduceMean → m)",
    ),
    "epsilon outside": (
        "q = Mul(x, x) m = ReduceMean(q, last) r = Sqrt(m) s = Add(r, eps) n = Div(x, s) y = Mul(n, w)",
        "epsilon is added to the root, not under it (Add → s)",
    ),
    "epsilon computed": (
        "e = ReduceMax(scale) " + FACTOR.replace("eps", "e") + " y = Mul(n, w)",
        "epsilon is not one constant (Add → s)",
    ),
    "of another value": (
        "a = Abs(x) q = Mul(a, a) m = ReduceMean(q, last) s = Add(m, eps) r = Sqrt(s) n = Div(x, r) y = Mul(n, w)",
        "what is squared is not what is divided (a)",
    ),
    "epsilon of more axes": (
        "e = Constant<value = float[1,1,1,1] {0.01}>() " + FACTOR.replace("eps", "e")
        + " k = Squeeze(n, zero) y = Mul(k, w)",
        "a constant adds axes (n)",
    ),
    "a power that adds axes, and moves the mean's": (
        "p = Constant<value = float[1,1,1,1] {2}>() q = Pow(x, p) m = ReduceMean(q, third) s = Add(m, eps) "
        "r = Sqrt(s) n = Div(x, r) k = Squeeze(n, zero) y = Mul(k, w)",
        "a constant adds axes before the mean (ReduceMean → m)",
    ),
    "the root rounded": (
        f"{NORM} h = Cast<to=10>(r) f = Cast<to=1>(h) n = Div(x, f) y = Mul(n, w)",
        "it is rounded to FLOAT16 inside (Cast → h)",
    ),
    "the mean rounded": (
        f"{FACTOR} y = Mul(n, w)".replace("s = Add(m, eps)", "h = Cast<to=10>(m) f = Cast<to=1>(h) s = Add(f, eps)"),
        "it is rounded to FLOAT16 inside (Cast → h)",
    ),
    "no squares": ("m = ReduceMean(x, last) s = Add(m, two) a = Abs(s) r = Sqrt(a) y = Div(x, r)", None),
    "length": ("m = ReduceL2(x, last) y = Div(x, m)", None),
    "a cube": ("c = Constant<value_float=3.0>() q = Pow(x, c) m = ReduceMean(q, last) s = Add(m, two) "
               "a = Abs(s) r = Sqrt(a) y = Div(x, r)", None),
}  # fmt: skip


def test_every_spelling(spelling: Any, check_spelling: Callable[..., None]) -> None:
    name = spelling.path.name
    half = ALL_HALF if name.startswith("quotient") else HALF
    tolerance = half if "fp16" in name or name == TWO_TYPES else {}
    check_spelling(spelling, PASSES, **tolerance, refused=name == TWO_TYPES)


def test_nothing_but_the_norm_is_left(spelling: Any) -> None:
    """Weight and casts are inside, and x and weight are of one type."""
    if not any(spelling.expect.values()):
        return
    model = ir.from_proto(onnx.load(spelling.path))
    run(model, (*PREPARE, *PASSES))
    case = spelling.path.name.split(".")[0]
    left = Counter(n.op_type for n in model.graph if n.op_type not in ("Constant", "RMSNormalization"))
    if case.startswith("heads_first"):  # the way there is another subject
        assert not left.keys() & {"Cast", "Mul", "Pow", "ReduceMean", "Sqrt"}
    elif case == "minus_half":
        assert left == {"Reshape": 1}  # of the weight, from [1, 1, 8]
    else:
        assert left == AROUND.get(case, {})
    (norm,) = (n for n in model.graph if n.op_type == "RMSNormalization")
    x, weight = norm.inputs
    assert x is not None and weight is not None
    assert x.dtype == weight.dtype == norm.outputs[0].dtype
    assert list(weight.shape or ()) == [8]
    assert norm.attributes.get_int("stash_type", 1) == ir.DataType.FLOAT
    if "fp16" in case or case == "diffusers_no_weight":
        assert (x.dtype == ir.DataType.FLOAT16) == (case != "diffusers_fp32_weight")


@pytest.mark.parametrize("name", SPELLINGS)
def test_by_hand(name: str, fused: Callable[..., ir.Model]) -> None:
    """What no exporter here writes."""
    model = fused(weighted(SPELLINGS[name]), PASSES)
    ops = Counter(n.op_type for n in model.graph)
    assert ops["RMSNormalization"] == 1
    assert not ops.keys() & {"Mul", "ReduceMean", "Sqrt", "Pow", "Reciprocal"}


@pytest.mark.parametrize("name", STAYS)
def test_a_near_miss_stays(name: str, reasons_left: Callable[..., list[str]]) -> None:
    body, reason = STAYS[name]
    assert reasons_left(weighted(body), PASSES) == ([] if reason is None else [reason])


def test_a_mean_that_meets_other_samples_than_its_own_stays(reasons_left: Callable[..., list[str]]) -> None:
    body = """m = ReduceMean<keepdims=0>(q, last) a = Constant<value_ints=[1,4,1]>() f = Reshape(m, a) s = Add(f, eps)
        r = Sqrt(s) n = Div(x, r) y = ReduceMean(n, second)"""
    text = weighted(f"q = Mul(x, x) {body}").replace("[B,N,8]", "[4,1,8]")
    assert reasons_left(text, PASSES) == ["the mean drops its axes (ReduceMean → m)"]


@pytest.mark.parametrize(("epsilon", "fires"), [("0.01", 1), ("1e-12", 0)])
def test_a_factor_in_fp16_that_may_be_infinite(epsilon: str, fires: int) -> None:
    """Of x in fp16 it may be rounded to fp16, as exporters have it, where that is only a rounding."""
    body = f"{NORM} i = Reciprocal(r) h = Cast<to=10>(i) y = Mul(x, h)".replace("Mul(x, x)", "Mul(f, f)")
    text = weighted(f"f = Cast<to=1>(x) {body}", dtype="float16").replace("eps = {0.01}", f"eps = {{{epsilon}}}")
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    run(model, PREPARE)
    assert rms_norm.apply(model) == fires
    left = [x.reason for x in rms_norm.left(model)]
    assert left == ([] if fires else ["it is rounded to FLOAT16 inside (Cast → h)"])


def test_fp64_stays(reasons_left: Callable[..., list[str]]) -> None:
    """The op computes in fp32."""
    body = f"eps2 = Cast<to=11>(eps) {FACTOR} w2 = Cast<to=11>(w) y = Mul(n, w2)".replace("(m, eps)", "(m, eps2)")
    assert reasons_left(weighted(body, dtype="double"), PASSES) == ["computed in DOUBLE (x)"]


@pytest.mark.parametrize(
    "weight",
    [
        "y = Mul(n, scale)",  # one vector per sample
        "k = Constant<value_float = 3.0>() y = Mul(n, k)",
        "d = ReduceMean<keepdims = 0>(scale, both) k = Add(d, w) y = Mul(n, k)",  # [8], and of the samples
    ],
)
def test_what_is_no_weight_stays_outside(weight: str, fused: Callable[..., ir.Model]) -> None:
    text = weighted(f"{FACTOR} {weight}").replace("both = {-1,1}", "both = {0,1}")
    model = fused(text, PASSES)
    ops = Counter(n.op_type for n in model.graph)
    assert ops["RMSNormalization"] == ops["Mul"] == 1


def test_a_weight_with_more_axes_than_x_stays_outside(fused: Callable[..., ir.Model]) -> None:
    text = weighted(f"{FACTOR} y = Mul(n, w)", weight="float[1,1,1,8] w = {1,2,3,4,5,6,7,8}")
    model = fused(text.replace("(float[B,N,8] y)", "(float[1,B,N,8] y)"), PASSES)
    ops = Counter(n.op_type for n in model.graph)
    assert ops["RMSNormalization"] == ops["Mul"] == 1


def test_a_modulation_of_one_sample_is_no_weight(fused: Callable[..., ir.Model]) -> None:
    """Where the batch is 1 a modulation has a weight's shape."""
    text = weighted(f"{FACTOR} k = Add(one, scale) y = Mul(n, k)").replace("[B,", "[1,")
    ops = Counter(n.op_type for n in fused(text, PASSES).graph)
    assert ops["RMSNormalization"] == ops["Mul"] == 1


def test_a_norm_that_is_read_without_its_weight_too_is_computed_once(fused: Callable[..., ir.Model]) -> None:
    text = weighted(f"{FACTOR} k = Mul(n, w) y = Add(k, n)")
    ops = Counter(n.op_type for n in fused(text, PASSES).graph)
    assert ops == {"RMSNormalization": 1, "Constant": 1, "Mul": 1, "Add": 1}


def test_several_axes(fused: Callable[..., ir.Model]) -> None:
    """The last two are one norm, where both sizes are known."""
    text = weighted(f"{FACTOR} y = Mul(n, w)").replace("(q, last)", "(q, both)").replace("[B,N,8]", "[B,3,8]")
    model = fused(text, PASSES)
    (norm,) = (n for n in model.graph if n.op_type == "RMSNormalization")
    assert norm.attributes.get_int("axis") == -2
    assert Counter(n.op_type for n in model.graph) == {"Constant": 1, "RMSNormalization": 1, "Mul": 1}


def test_in_a_local_function(fused: Callable[..., ir.Model]) -> None:
    """The weight is an input there, and ones a Constant, not an initializer."""
    text = """g (float[B,N,8] x) => (float[B,N,8] y, float[B,N,8] z) <float[8] w = {1,2,3,4,5,6,7,8}> {
          y, z = local.Block(x, w)
        }
        <domain: "local", opset_import: ["": 23]>
        Block (x, w) => (y, n) {
          last = Constant<value_ints = [-1]>()
          eps = Constant<value_float = 0.01>()
          q = Mul(x, x) m = ReduceMean(q, last) s = Add(m, eps) r = Sqrt(s) i = Reciprocal(r)
          a = Mul(x, i)
          y = Mul(a, w)
          h = Mul(y, y) k = ReduceMean(h, last) l = Add(k, eps) o = Sqrt(l)
          n = Div(y, o)
        }"""
    (block,) = fused(text, PASSES).functions.values()
    assert Counter(n.op_type for n in block) == {"RMSNormalization": 2, "Constant": 1}
    assert [n.inputs[1] is block.inputs[1] for n in block if n.op_type == "RMSNormalization"] == [True, False]


def test_fp32_x_and_fp16_weight(fused: Callable[..., ir.Model]) -> None:
    """The weight is multiplied in fp32, before the cast."""
    half = "float16[8] w = {15360,16384,16896,17408,17664,17920,18176,18432}"
    text = weighted(f"{FACTOR} c = Cast<to=10>(n) y = Mul(w, c)", weight=half)
    model = fused(text.replace("(float[B,N,8] y)", "(float16[B,N,8] y)"), PASSES, **HALF)
    assert Counter(n.op_type for n in model.graph) == {"Cast": 2, "RMSNormalization": 1}


def test_a_weight_that_fp16_does_not_hold_stays_fp32(fused: Callable[..., ir.Model]) -> None:
    exact = fused(weighted(UPCAST, dtype="float16"), PASSES, **HALF)
    assert Counter(n.op_type for n in exact.graph) == {"RMSNormalization": 1, "Constant": 1}
    inexact = fused(weighted(UPCAST, dtype="float16").replace("{1,2,", "{0.1,2,"), PASSES, **HALF)
    assert Counter(n.op_type for n in inexact.graph) == {"RMSNormalization": 1, "Cast": 2}
    (left,) = norm_casts.left(inexact)
    assert left.reason == "it has numbers that FLOAT16 has not (w)"


def test_weights_in_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    """They are looked at to see whether fp16 holds them, and are not needed for it."""
    proto = onnx.parser.parse_model(HEADER + weighted(UPCAST, dtype="float16"))
    weight = proto.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight), weight.name))  # as raw data
    onnx.external_data_helper.set_external_data(weight, location="absent.bin", offset=0, length=32)
    weight.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = ir.load(tmp_path / "m.onnx")
    run(model, (*PREPARE, *PASSES))
    assert Counter(n.op_type for n in model.graph) == {"RMSNormalization": 1, "Cast": 2}


def test_bf16() -> None:
    """No kernel here computes in it: structure only."""
    text = weighted(UPCAST.replace("k = Mul(n, w) y = Cast<to=10>(k)", "k = Cast<to=16>(n) y = Mul(k, v)"))
    text = text.replace("float[B,N,8]", "bfloat16[B,N,8]").replace("scale)", "scale, bfloat16[8] v)")
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    run(model, (*PREPARE, *PASSES))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (norm,) = model.graph
    assert norm.op_type == "RMSNormalization"
    assert {v.dtype for v in (*norm.inputs, *norm.outputs) if v is not None} == {ir.DataType.BFLOAT16}


@pytest.mark.parametrize("domain", ["", "com.microsoft."])
def test_onnx_runtimes_own_name_of_it(domain: str) -> None:
    text = weighted(f"y = {domain}SimplifiedLayerNormalization<axis=-1, epsilon=0.5, stash_type=1>(x, w)")
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    assert rms_norm.apply(model) == 1
    (norm,) = model.graph
    assert (norm.domain, norm.op_type) == ("", "RMSNormalization")
    assert {name: a.value for name, a in norm.attributes.items()} == {"axis": -1, "epsilon": 0.5, "stash_type": 1}


def test_onnx_runtimes_own_name_of_it_computes_the_same(in_onnx_runtime: Callable[..., list[np.ndarray]]) -> None:
    proto = onnx.parser.parse_model(HEADER + weighted("y = SimplifiedLayerNormalization<epsilon=0.5>(x, w)"))
    model = ir.from_proto(proto)
    rms_norm.apply(model)
    np.testing.assert_allclose(in_onnx_runtime(ir.to_proto(model)), in_onnx_runtime(proto), rtol=1e-6)


def test_its_factor_is_an_output_too() -> None:
    text = weighted("y, f = SimplifiedLayerNormalization(x, w) z = Neg(f)").replace("y)", "y, float[B,N,1] z)", 1)
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    assert rms_norm.apply(model) == 0
    assert [x.reason for x in rms_norm.left(model)] == [
        "its factor is an output too (SimplifiedLayerNormalization → y)"
    ]


def test_they_run_before_what_reads_norms() -> None:
    names = [step.name for step in FUSE]
    places = [names.index(step.name) for step in PASSES]
    assert places == sorted(places) and places[0] == 0
    assert names.index("modulate") > names.index(norm_casts.name)
