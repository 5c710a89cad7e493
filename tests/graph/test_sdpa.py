"""Attentions that are spelled out become one op, with the mask and the layout that suit it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mmdit_deploy.graph.fuse import PREPARE
from mmdit_deploy.graph.fuse.attention.attention_layout import attention_heads, attention_layout
from mmdit_deploy.graph.fuse.attention.attention_mask import attention_mask
from mmdit_deploy.graph.fuse.attention.sdpa import sdpa
from mmdit_deploy.graph.fuse.known_values import known
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.lower.multi_head_attention import multi_head_attention
from mmdit_deploy.graph.passes import run

SUBJECT = "sdpa"
FIXTURES = Path(__file__).parent / "fixtures" / SUBJECT
Execute = Callable[[onnx.ModelProto], list[np.ndarray]]
PASSES = (sdpa, attention_mask, attention_heads, attention_layout)
HALF = {"rtol": 5e-3, "atol": 5e-3}  # scores round otherwise: by a few units of fp16
# Masks of keys on the op itself: ONNX Runtime refuses what torch writes.
REFUSED = ("torch-keys.dynamo-23", "torch-bool-keys.dynamo-23")
NEAR_MISSES = {
    "softmax-of-queries": "the softmax is not over the keys, the last axis (",
    "softcap": "between the product and the softmax is more than a scale and masks: Tanh (",
    "probabilities-kept": "others read the scores or the probabilities too (",
    "scale-per-head": "the scores' scale is not one known number (",
}


def test_spelling(spelling: Any, check_spelling: Callable[..., None]) -> None:
    name = spelling.path.stem
    tolerance = HALF if "half" in name or "upcast" in name else {}
    check_spelling(spelling, PASSES, **tolerance, refused=name in REFUSED)


def test_every_transpose_is_gone(spelling: Any) -> None:
    """A case that starts and ends with (B, N, H·D) needs none; neither does one whose heads come first."""
    if not spelling.expect["Attention"]:
        return
    model = ir.load(spelling.path)
    run(model, (*PREPARE, *PASSES))
    assert not [node for node in model.graph if node.op_type == "Transpose"]


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_near_miss_of_an_exporter_is_left_with_a_reason(case: str) -> None:
    files = json.loads((FIXTURES / "index.json").read_text())["files"]
    spellings = [name for name, about in files.items() if about["case"] == case]
    assert spellings
    for name in spellings:
        assert _left(ir.load(FIXTURES / name))[0].startswith(NEAR_MISSES[case])


# What exporters at hand do not write, in ONNX's own textual form.

Q, K, V = "float[batch,4,tokens,8] q", "float[batch,4,keys,8] k", "float[batch,4,keys,8] v"
Y = "float[batch,4,tokens,8] y"
PRODUCT = "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt)"
REST = "p = Softmax<axis=-1>(x) y = MatMul(p, v)"


def graph(body: str, *inputs: str, weights: str = "", outputs: str = Y) -> str:
    """A graph of Q, K, V and more inputs; inputs of the same names replace these."""
    named = {value.split()[-1]: value for value in (Q, K, V, *inputs)}
    return f"g ({', '.join(named.values())}) => ({outputs}) {weights and f'<{weights}>'} {{ {body} }}"


@dataclass(frozen=True)
class Case:
    """A graph with one attention, and the ops that are left of it."""

    text: str
    left: Mapping[str, int] = field(default_factory=lambda: {"Attention": 1})
    tolerance: float = 2e-5


def masked(mask: str, body: str = "x = Add(s, mask)", weights: str = "") -> str:
    return graph(f"{PRODUCT} {body} {REST}", mask, weights=weights)


ROWS = {"Attention": 1, "Constant": 2, "Shape": 1, "Concat": 1, "Expand": 1}
HALF_Q = ("float16[batch,4,tokens,8] q", "float16[batch,4,keys,8] k", "float16[batch,4,keys,8] v")
HALF_Y = "float16[batch,4,tokens,8] y"
PARTED = """
    q4 = Reshape(q, heads) qt = Transpose<perm=[0,2,1,3]>(q4) q3 = Reshape(qt, rows)
    k4 = Reshape(k, heads) kt = Transpose<perm=[0,2,1,3]>(k4) k3 = Reshape(kt, columns)
    v4 = Reshape(v, heads) vt = Transpose<perm=[0,2,1,3]>(v4) v3 = Reshape(vt, columns)
"""
PARTED_INPUTS = ("float[2,5,32] q", "float[2,7,32] k", "float[2,7,32] v")
PARTED_WEIGHTS = "int64[4] heads = {0,0,4,8}, int64[3] rows = {8,5,8}, int64[3] columns = {8,7,8}, \
    int64[4] apart = {2,4,5,8}, int64[3] whole = {0,0,32}, int64[4] scores = {2,4,5,7}, int64[3] flat = {8,5,7}"
MERGED = "a = MatMul(p, v3) b = Reshape(a, apart) c = Transpose<perm=[0,2,1,3]>(b) y = Reshape(c, whole)"

FIRES = {
    "scale from a shape": Case(
        graph(
            f"""{PRODUCT} shape = Shape(k) width = Gather<axis=0>(shape, last) f = Cast<to=1>(width) r = Sqrt(f)
            scale = Reciprocal(r) x = Mul(scale, s) {REST}""",
            weights="int64 last = {-1}",
        )
    ),
    "K scaled before its transpose": Case(
        graph(
            f"ks = Mul(k, c) kt = Transpose<perm=[0,1,3,2]>(ks) qs = Div(q, c) x = MatMul(qs, kt) {REST}",
            weights="float c = {2.0}",
        )
    ),
    "K transposed twice": Case(
        graph(
            f"a = Transpose<perm=[0,2,1,3]>(k) b = Transpose<perm=[0,2,3,1]>(a) x = MatMul(q, b) {REST}",
        ),
    ),
    "K that comes transposed": Case(
        graph(f"x = MatMul(q, k) {REST}", "float[batch,4,8,keys] k"), {"Transpose": 1, "Attention": 1}
    ),
    "axis counted from the start": Case(graph(f"{PRODUCT} p = Softmax<axis=3>(s) y = MatMul(p, v)")),
    "identity and dropout": Case(
        graph(
            f"""{PRODUCT} i = Identity(s) p = Softmax<axis=-1>(i) d, m = Dropout(p, ratio, training) j = Identity(d)
            y = MatMul(j, v)""",
            weights="float ratio = {0.1}, bool training = {0}",
        )
    ),
    "mask that is scaled": Case(
        masked("float[batch,4,tokens,keys] mask", "a = Add(mask, s) x = Mul(a, c)", "float c = {0.5}"),
        {"Attention": 1, "Constant": 1, "Mul": 1},
    ),
    "two masks": Case(
        graph(
            f"{PRODUCT} a = Add(s, bias) x = Add(mask, a) {REST}",
            "float[1,4,tokens,keys] bias",
            "float[batch,1,tokens,keys] mask",
        ),
        {"Attention": 1, "Add": 1},
    ),
    "mask of keys": Case(masked("float[keys] mask"), {**ROWS, "Constant": 3, "Unsqueeze": 1}),
    "mask of keys per sample": Case(masked("float[batch,1,1,keys] mask"), ROWS),
    "mask of queries": Case(masked("float[batch,1,tokens,1] mask"), ROWS),
    "mask of nothing": Case(masked("float[batch,4,1,1] mask"), {**ROWS, "Constant": 1, "Shape": 2}),
    "mask of three axes": Case(masked("float[4,tokens,keys] mask"), {"Attention": 1, "Constant": 1, "Unsqueeze": 1}),
    "condition of what is masked": Case(
        masked("bool[batch,1,tokens,keys] mask", "x = Where(mask, low, s)", "float low = {-1e30}"),
        {"Attention": 1, "Constant": 2, "Where": 1},
    ),
    "one head of K and V": Case(
        graph(f"{PRODUCT} x = Identity(s) {REST}", "float[batch,1,keys,8] k", "float[batch,1,keys,8] v")
    ),
    "unlike widths": Case(
        graph(f"{PRODUCT} x = Identity(s) {REST}", "float[batch,4,keys,6] v", outputs="float[batch,4,tokens,6] y")
    ),
    "einsum with the tokens first": Case(
        graph(
            """s = Einsum<equation="b n h d, b m h d -> b h n m">(q, k) p = Softmax<axis=-1>(s)
            a = Einsum<equation="bhnm,bmhd->bnhd">(p, v) y = Reshape(a, whole)""",
            *("float[batch,tokens,4,8] q", "float[batch,keys,4,8] k", "float[batch,keys,4,8] v"),
            weights="int64[3] whole = {0,0,32}",
            outputs="float[batch,tokens,32] y",
        ),
        {"Attention": 1, "Reshape": 3, "Constant": 1},
    ),
    "heads in the batch axis": Case(
        graph(
            f"{PARTED} t = Transpose<perm=[0,2,1]>(k3) x = MatMul(q3, t) p = Softmax<axis=-1>(x) {MERGED}",
            *PARTED_INPUTS,
            weights=PARTED_WEIGHTS,
            outputs="float[2,5,32] y",
        )
    ),
    "heads in the batch axis, masked apart": Case(
        graph(
            f"""{PARTED} t = Transpose<perm=[0,2,1]>(k3) s = MatMul(q3, t) s4 = Reshape(s, scores)
            m = Add(s4, mask) x = Reshape(m, flat) p = Softmax<axis=-1>(x) {MERGED}""",
            *(*PARTED_INPUTS, "float[2,1,5,7] mask"),
            weights=PARTED_WEIGHTS,
            outputs="float[2,5,32] y",
        )
    ),
    "heads in the batch axis, masked there": Case(
        graph(
            f"""{PARTED} t = Transpose<perm=[0,2,1]>(k3) s = MatMul(q3, t) flat_mask = Reshape(mask, flat)
            x = Add(s, flat_mask) p = Softmax<axis=-1>(x) {MERGED}""",
            *(*PARTED_INPUTS, "float[2,4,5,7] mask"),
            weights=PARTED_WEIGHTS,
            outputs="float[2,5,32] y",
        )
    ),
    "heads in the batch axis, and in the mask's": Case(
        graph(
            f"""{PARTED} t = Transpose<perm=[0,2,1]>(k3) s = MatMul(q3, t) x = Add(s, mask)
            p = Softmax<axis=-1>(x) {MERGED}""",
            *(*PARTED_INPUTS, "float[8,5,7] mask"),
            weights=PARTED_WEIGHTS,
            outputs="float[2,5,32] y",
        ),
        {"Attention": 1, "Constant": 1, "Unsqueeze": 1, "Reshape": 8, "Transpose": 4},
    ),
    "no heads": Case(
        graph(
            "t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) x = Mul(s, c) p = Softmax<axis=-1>(x) y = MatMul(p, v)",
            *("float[batch,tokens,8] q", "float[batch,keys,8] k", "float[batch,keys,8] v"),
            weights="float c = {0.1}",
            outputs="float[batch,tokens,8] y",
        )
    ),
    "scores and softmax in fp32": Case(
        graph(
            f"""{PRODUCT} f = Cast<to=1>(s) a = Add(f, mask) b = Softmax<axis=-1>(a) p = Cast<to=10>(b)
            y = MatMul(p, v)""",
            *(*HALF_Q, "float[batch,1,tokens,keys] mask"),
            outputs=HALF_Y,
        ),
        {"Attention": 1, "Constant": 2, "Clip": 1, "Cast": 1},
        5e-3,
    ),
    "groups of heads, repeated with the tokens first": Case(
        graph(
            """
            a = Unsqueeze(k, three) b = Expand(a, groups) c = Reshape(b, heads) kt = Transpose<perm=[0,2,3,1]>(c)
            d = Unsqueeze(v, three) e = Expand(d, groups) f = Reshape(e, heads) vt = Transpose<perm=[0,2,1,3]>(f)
            x = MatMul(q, kt) p = Softmax<axis=-1>(x) y = MatMul(p, vt)
            """,
            *("float[batch,keys,2,8] k", "float[batch,keys,2,8] v"),
            weights="int64[1] three = {3}, int64[5] groups = {1,1,1,2,1}, int64[4] heads = {0,0,4,8}",
        ),
        {"Attention": 1, "Transpose": 2},
    ),
}

LEFT = {
    "fp64": (
        graph(
            f"{PRODUCT} x = Identity(s) {REST}",
            *("double[batch,4,tokens,8] q", "double[batch,4,keys,8] k", "double[batch,4,keys,8] v"),
            outputs="double[batch,4,tokens,8] y",
        ),
        "Q, K and V are DOUBLE (q)",
    ),
    "a product in fp32 for V in fp16": (
        graph(
            """q32 = Cast<to=1>(q) k32 = Cast<to=1>(k) kt = Transpose<perm=[0,1,3,2]>(k32) s = MatMul(q32, kt)
            a = Softmax<axis=-1>(s) p = Cast<to=10>(a) y = MatMul(p, v)""",
            *HALF_Q,
            outputs=HALF_Y,
        ),
        "Q, K and V are not of one type (q32, k32, v)",
    ),
    "matrices": (
        "g (float[tokens,8] q, float[8,5] k, float[5,8] v) => (float[tokens,8] y) { x = MatMul(q, k) "
        "p = Softmax<axis=-1>(x) y = MatMul(p, v) }",
        "the product is not one of Q and K with a batch, and heads or not (",
    ),
    "tokens times weights": (
        "g (float[batch,tokens,8] q, float[8,5] k, float[5,8] v) => (float[batch,tokens,8] y) { x = MatMul(q, k) "
        "p = Softmax<axis=-1>(x) y = MatMul(p, v) }",
        "the product is not one of Q and K with a batch, and heads or not (",
    ),
    "K and V of all samples": (
        graph(f"{PRODUCT} x = Identity(s) {REST}", "float[1,4,keys,8] k", "float[1,4,keys,8] v"),
        "Q, K and V have unlike batches (q, k, v)",
    ),
    "unlike heads": (
        graph(f"{PRODUCT} x = Identity(s) {REST}", "float[batch,1,keys,8] k"),
        "Q, K and V have unlike heads (q, k, v)",
    ),
    "a mask that stretches the scores": (
        graph(
            f"{PRODUCT} x = Add(s, mask) p = Softmax<axis=-1>(x) y = MatMul(p, v)",
            *("float[1,4,tokens,8] q", "float[1,4,keys,8] k", "float[1,4,keys,8] v", "float[batch,1,tokens,keys] mask"),
        ),
        "the mask stretches the scores (mask)",
    ),
    "a mask of zeros that stretches the heads": (
        graph(
            f"{PRODUCT} x = Add(s, zero) {REST}",
            *("float[2,1,5,8] q", "float[2,1,7,8] k", "float[2,1,7,8] v"),
            weights="float[1,4,1,1] zero = {0,0,0,0}",
            outputs="float[2,4,5,8] y",
        ),
        "the mask stretches the scores (zero)",
    ),
    "a scale of five axes": (
        graph(
            f"{PRODUCT} x = Mul(s, c) {REST}",
            weights="float[1,1,1,1,1] c = {0.25}",
            outputs="float[1,batch,4,tokens,8] y",
        ),
        "the scores may get more axes (c)",
    ),
    "a fill of five axes": (
        graph(
            f"{PRODUCT} x = Where(mask, s, low) {REST}",
            "bool[batch,1,tokens,keys] mask",
            weights="float[1,1,1,1,1] low = {-1e30}",
            outputs="float[1,batch,4,tokens,8] y",
        ),
        "the scores may get more axes (low)",
    ),
    "a scale below zero": (
        graph(f"{PRODUCT} x = Mul(s, c) {REST}", weights="float c = {-0.25}"),
        "the scale is -0.25, and ONNX Runtime's op takes none below 0 (",
    ),
    "a fill near other scores": (
        masked("bool[batch,1,tokens,keys] mask", "x = Where(mask, s, low)", "float low = {-1e4}"),
        "scores are replaced by -10000, which is not far below all others (mask)",
    ),
    "other scores in place of masked ones": (
        masked("bool[batch,1,tokens,keys] mask", "other = Neg(s) x = Where(mask, s, other)"),
        "scores are replaced by what is not one known number (",
    ),
    "zeros in place of probabilities": (
        graph(
            f"{PRODUCT} p = Softmax<axis=-1>(s) z = Where(mask, zero, p) y = MatMul(z, v)",
            "bool[batch,1,tokens,keys] mask",
            weights="float zero = {0}",
        ),
        "probabilities are replaced after the softmax (",
    ),
    "a scale that callers may change": (
        graph(f"{PRODUCT} x = Mul(s, c) {REST}", "float c", weights="float c = {0.5}"),
        "the scores' scale is not one known number (",
    ),
    "windows": (
        graph(
            f"{PRODUCT} a = Reshape(s, windows) b = Add(a, mask) x = Reshape(b, back) {REST}",
            *("float[6,4,5,8] q", "float[6,4,5,8] k", "float[6,4,5,8] v", "float[3,1,5,5] mask"),
            weights="int64[5] windows = {2,3,4,5,5}, int64[4] back = {6,4,5,5}",
            outputs="float[6,4,5,8] y",
        ),
        "scores are reshaped to other axes (",
    ),
}


def _model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 23]>\n' + text))


def _left(model: ir.Model) -> list[str]:
    """The reasons, of a graph in which nothing fires."""
    run(model, PREPARE)
    results = run(model, PASSES, explain=True)
    assert not any(result.count for result in results), results
    return [left.reason for result in results for left in result.left]


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, in_onnx_runtime: Execute) -> None:
    case = FIRES[name]
    model = _model(case.text)
    before = ir.to_proto(model)
    run(model, PREPARE)
    assert run(model, PASSES)[0].count == 1
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert Counter(node.op_type for node in model.graph) == Counter(case.left)
    np.testing.assert_allclose(
        in_onnx_runtime(after)[0], in_onnx_runtime(before)[0], rtol=case.tolerance, atol=case.tolerance
    )
    assert not any(result.count for result in run(model, PASSES))
    assert ir.to_proto(model) == after


@pytest.mark.parametrize("name", LEFT)
def test_a_near_miss_is_left_with_a_reason(name: str, in_onnx_runtime: Execute) -> None:
    text, reason = LEFT[name]
    model = _model(text)
    assert np.isfinite(in_onnx_runtime(ir.to_proto(model))[0].astype(np.float32)).all()  # a graph that could run
    reasons = _left(model)
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)


def test_the_scale_is_what_the_graph_computes() -> None:
    """In the graph's own types; the op's default is not spelled out."""
    for scale, expected in (("0.25", 0.25), ("0.35355339", None)):
        model = _model(graph(f"{PRODUCT} x = Mul(s, c) {REST}", weights=f"float c = {{{scale}}}"))
        run(model, (*PREPARE, *PASSES))
        (node,) = model.graph
        assert node.attributes.get_float("scale", None) == expected


def test_no_precision_is_asked_of_the_softmax() -> None:
    """TensorRT-RTX refuses the attribute."""
    model = _model(FIRES["scores and softmax in fp32"].text)
    run(model, (*PREPARE, *PASSES))
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert set(attention.attributes) <= {"scale"}


def test_what_is_known_of_a_value() -> None:
    """In fp16, as the graph computes it: the root of 24 is 4.8984375 there."""
    model = _model("""g (float16[batch,tokens,24] x, float16 d) => (float16[1] y, float16[1] z, int64[2] n)
        <int64[1] a = {-1}, int64[1] b = {9223372036854775807}, float16 d = {2}> {
      shape = Shape(x) width = Slice(shape, a, b) h = Cast<to=10>(width) y = Sqrt(h) z = Mul(y, d)
      zero = Constant<value_ints = [0]>() two = Constant<value_ints = [2]>()
      n = Slice(shape, zero, two)
    }""")
    y, z, tokens = model.graph.outputs
    elements = known(y)
    assert elements is not None
    assert (elements.dtype, elements.tolist()) == (np.float16, [4.8984375])
    assert known(z) is None  # a caller may give another d
    assert known(tokens) is None  # and other sizes


FUNCTION = """<ir_version: 11, opset_import: ["": 23, "local": 1]>
g (float[batch,4,tokens,8] q, float[batch,4,keys,8] k, float[batch,4,keys,8] v, bool[batch,1,1,keys] mask)
    => (float[batch,4,tokens,8] y) { y = local.Attend(q, k, v, mask) }
<domain: "local", opset_import: ["": 23]> Attend (q, k, v, mask) => (y) {
    kt = Transpose<perm=[0,1,3,2]>(k)
    s = MatMul(q, kt)
    c = Constant<value = float {0.5}>()
    low = Constant<value = float {-inf}>()
    a = Mul(s, c)
    x = Where(mask, a, low)
    p = Softmax<axis=-1>(x)
    nan = IsNaN(p)
    zero = Constant<value = float {0.0}>()
    z = Where(nan, zero, p)
    y = MatMul(z, v)
}"""


def test_in_a_function(in_onnx_runtime: Execute) -> None:
    before = onnx.parser.parse_model(FUNCTION)
    model = ir.from_proto(before)
    run(model, PREPARE)
    assert [result.count for result in run(model, PASSES)] == [1, 1, 0, 0]
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert sum(node.op_type == "Attention" for node in after.functions[0].node) == 1
    np.testing.assert_allclose(in_onnx_runtime(after)[0], in_onnx_runtime(before)[0], rtol=2e-5, atol=2e-5)
    assert not any(result.count for result in run(model, PASSES))


BRANCHES = f"""g (bool wide, {Q}, {K}, {V}, bool[batch,1,1,keys] mask) => ({Y}, float[batch,4,tokens,8] z) {{
    y = If(wide) <
      then_branch = a () => (float[batch,4,tokens,8] there) {{
        there = Attention(q, k, v, mask)
      }}, else_branch = b () => (float[batch,4,tokens,8] here) {{
        kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) here = MatMul(p, v)
      }}>
    z = Attention(q, k, v, mask)
}}"""


def test_in_a_branch() -> None:
    """What a branch makes of a mask, nothing outside can read."""
    model = _model(BRANCHES)
    run(model, PREPARE)
    assert [result.count for result in run(model, PASSES)] == [1, 2, 0, 0]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    branch = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    for nodes in (model.graph, branch):
        assert Counter(node.op_type for node in nodes)["Expand"] == 1


def test_what_others_read_is_kept(in_onnx_runtime: Execute) -> None:
    """Scaled Q, transposed K and the result have more readers."""
    text = graph(
        f"qs = Mul(q, c) kt = Transpose<perm=[0,1,3,2]>(k) x = MatMul(qs, kt) {REST} z = Neg(y)",
        weights="float c = {0.25}",
        outputs=f"{Y}, float[batch,4,tokens,8] qs, float[batch,4,8,keys] kt, float[batch,4,tokens,8] z",
    )
    model = _model(text)
    before = ir.to_proto(model)
    run(model, PREPARE)
    assert run(model, PASSES)[0].count == 1
    after = ir.to_proto(model)
    for mine, theirs in zip(in_onnx_runtime(after), in_onnx_runtime(before), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert [value.name for value in attention.inputs] == ["q", "k", "v"]


@pytest.mark.parametrize(
    "text",
    {
        "another runtime's op": "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)",
        "one op already": "y = Attention<is_causal=1, scale=0.5>(q, k, v)",
        "no softmax": "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) p = Sigmoid(s) y = MatMul(p, v)",
        "no product": "p = Softmax<axis=-1>(k) y = MatMul(p, v)",
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_something_else_is_not_even_found(text: tuple[str, str]) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>\ng ({Q}, {K}, {V}) => ({Y}) {{ {text[1]} }}'
        )
    )
    assert not _left(model)


def test_shapes_that_are_not_known() -> None:
    text = graph(
        f"a = Reshape(k, any) {PRODUCT} {REST}".replace("(k) s", "(a) s").replace("(x)", "(s)"), "int64[rank] any"
    )
    assert _left(_model(text)) == ["the shapes of Q and K are not known (MatMul → s)"]


# Masks


def attended(mask: str, *, half: bool = False) -> str:
    inputs = HALF_Q if half else ()
    return graph("y = Attention(q, k, v, mask)", *inputs, mask, outputs=HALF_Y if half else Y)


MASKS = {
    "bool": (attended("bool[batch,1,tokens,keys] mask"), {"Where": 1, "Constant": 2}),
    "bool of keys": (attended("bool[batch,1,1,keys] mask"), {"Where": 1, **ROWS, "Constant": 4}),
    "bool of three axes": (attended("bool[4,tokens,keys] mask"), {"Where": 1, "Constant": 3, "Unsqueeze": 1}),
    "of keys": (attended("float[batch,4,1,keys] mask"), ROWS),
    "of another type": (
        attended("float[batch,1,tokens,keys] mask", half=True),
        {"Clip": 1, "Constant": 2, "Cast": 1},
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_repaired(name: str, in_onnx_runtime: Execute, in_onnx: Execute) -> None:
    """ONNX Runtime's numbers of the repaired graph are those that ONNX has for it as it was."""
    text, left = MASKS[name]
    model = _model(text)
    before = ir.to_proto(model)
    run(model, PREPARE)
    assert attention_mask.apply(model) == 1
    assert Counter(node.op_type for node in model.graph) == Counter({**left, "Attention": 1})
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    tolerance = 5e-3 if name == "of another type" else 2e-5
    np.testing.assert_allclose(in_onnx_runtime(after)[0], in_onnx(before)[0], rtol=tolerance, atol=tolerance)
    assert attention_mask.apply(model) == 0


@pytest.mark.parametrize("mask", ["float[batch,1,tokens,keys] mask", "float[1,4,tokens,keys] mask"])
def test_a_mask_that_is_as_it_should_be_stays(mask: str) -> None:
    model = _model(attended(mask))
    run(model, PREPARE)
    assert attention_mask.apply(model) == 0
    assert not attention_mask.left(model)


def test_a_row_that_is_all_masked(in_onnx_runtime: Execute) -> None:
    """Zeros, as ONNX says, whether the mask is of bool or added."""
    model = _model(graph("no = Not(yes) mask = And(yes, no) y = Attention(q, k, v, mask)", "bool[tokens,keys] yes"))
    run(model, PREPARE)
    assert attention_mask.apply(model) == 1
    assert not in_onnx_runtime(ir.to_proto(model))[0].any()


def test_one_mask_is_repaired_once() -> None:
    """Its rows are big, and all blocks of a model have one."""
    model = _model(graph("a = Attention(q, k, v, mask) y = Attention(a, k, v, mask)", "bool[batch,1,1,keys] mask"))
    run(model, PREPARE)
    assert attention_mask.apply(model) == 2
    found = Counter(node.op_type for node in model.graph)
    assert (found["Where"], found["Expand"]) == (1, 1)
    assert mask_of_keys.apply(model) == 2  # for TensorRT, the rows go away again
    assert "Expand" not in {node.op_type for node in model.graph}


# Layout: where transposes end up.

TOKENS_FIRST = ("float[batch,tokens,4,8] q", "float[batch,keys,4,8] k", "float[batch,keys,4,8] v")
WHOLE = "a = Attention({q}, {k}, {v}) t = Transpose<perm=[0,2,1,3]>(a) y = Reshape(t, whole)"


def laid_out(body: str, *inputs: str, q: str = "qt", k: str = "kt", v: str = "vt", weights: str = "") -> str:
    return graph(
        f"{body} {WHOLE.format(q=q, k=k, v=v)}",
        *inputs,
        weights=f"int64[3] whole = {{0,0,32}}{weights}",
        outputs="float[batch,tokens,32] y",
    )


def transposes(*names: str) -> str:
    return " ".join(f"{name}t = Transpose<perm=[0,2,1,3]>({name})" for name in names)


LAYOUTS = {
    "a norm, and a product with one number per channel": (
        laid_out(
            f"""{transposes("q", "k", "v")} n = RMSNormalization<axis=-1>(qt, w) m = Mul(kt, w)""",
            *TOKENS_FIRST,
            q="n",
            k="m",
            weights=", float[8] w = {1,2,3,4,5,6,7,8}",
        ),
        0,
    ),
    "a concatenation of tokens": (
        laid_out(
            f"""{transposes("q", "k", "v", "k2", "v2")} kk = Concat<axis=2>(kt, k2t) vv = Concat<axis=-2>(v2t, vt)""",
            *(*TOKENS_FIRST, "float[batch,3,4,8] k2", "float[batch,3,4,8] v2"),
            k="kk",
            v="vv",
        ),
        0,
    ),
    "RoPE": (
        laid_out(
            f"""{transposes("q", "k", "v")} f = Cast<to=1>(qt) r = RotaryEmbedding<interleaved=1>(f, cos, sin)""",
            *(*TOKENS_FIRST, "float[batch,tokens,4] cos", "float[batch,tokens,4] sin"),
            q="r",
        ),
        0,
    ),
    "one value for Q, K and V": (
        laid_out(f"{transposes('q')}", "float[batch,tokens,4,8] q", k="qt", v="qt"),
        0,
    ),
    "K from a cache": (laid_out(f"{transposes('q', 'v')}", TOKENS_FIRST[0], TOKENS_FIRST[2], k="k"), 1),
    "K and V from a cache": (laid_out(f"{transposes('q')}", TOKENS_FIRST[0], k="k", v="v"), 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_transposes_that_are_left(name: str, in_onnx_runtime: Execute) -> None:
    text, count = LAYOUTS[name]
    model = _model(text)
    before = ir.to_proto(model)
    run(model, PREPARE)
    fires = attention_layout.apply(model)
    assert fires == (count < 2)
    assert Counter(node.op_type for node in model.graph)["Transpose"] == count
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(in_onnx_runtime(after)[0], in_onnx_runtime(before)[0], rtol=2e-5, atol=2e-5)
    assert attention_layout.apply(model) == 0
    if not fires:
        (left,) = attention_layout.left(model)
        assert left.reason.startswith("with (B, N, H·D) there would be as many transposes (k, v)")


def test_a_norm_that_others_read_is_not_made_twice() -> None:
    text = laid_out(f"{transposes('q', 'k', 'v')} n = Tanh(qt) m = Tanh(kt)", *TOKENS_FIRST, q="n", k="m").replace(
        "(float[batch,tokens,32] y)", "(float[batch,tokens,32] y, float[batch,4,tokens,8] n)"
    )
    model = _model(text)
    run(model, PREPARE)
    assert attention_layout.apply(model) == 1
    found = Counter(node.op_type for node in model.graph)
    assert (found["Tanh"], found["Transpose"]) == (2, 2)


def test_windows_that_are_merged_are_not_heads() -> None:
    """[w, n, 64] becomes [w/4, 4·n, 64]: no dim is a number, and none is what it was."""
    text = """g (float[w,n,32] x) => (float[images,pixels,32] y)
        <int64[4] heads = {0,0,4,8}, int64[1] four = {4}, int64[1] width = {32}> {
      h = Reshape(x, heads) q = Transpose<perm=[0,2,1,3]>(h) a = Attention(q, q, q)
      t = Transpose<perm=[0,2,1,3]>(a) w = Shape<start=0, end=1>(x) n = Shape<start=1, end=2>(x)
      images = Div(w, four) pixels = Mul(n, four) shape = Concat<axis=0>(images, pixels, width) y = Reshape(t, shape)
    }"""
    model = _model(text)
    run(model, PREPARE)
    assert attention_layout.apply(model) == 0
    assert attention_layout.left(model)[0].reason.startswith("the result is not merged to (B, N, H·D)")


def test_a_bias_beyond_fp16_is_finite_there(in_onnx_runtime: Execute) -> None:
    text = FIRES["scores and softmax in fp32"].text.replace("a = Add(f, mask)", "b1 = Mul(mask, big) a = Add(f, b1)")
    model = _model(text.replace(" {", " <float big = {1e6}> {", 1))
    before = in_onnx_runtime(ir.to_proto(model))[0]
    run(model, PREPARE)
    assert run(model, PASSES)[0].count == 1
    after = in_onnx_runtime(ir.to_proto(model))[0]
    assert np.isfinite(before).all() and np.isfinite(after).all()


def test_a_row_that_is_all_masked_with_a_finite_fill(in_onnx_runtime: Execute) -> None:
    """Its probabilities are equal, however big its scores are."""
    body = "none = Xor(mask, mask) big = Mul(s, c) x = Where(none, big, low)"
    model = _model(masked("bool[batch,1,tokens,keys] mask", body, "float c = {1e5}, float low = {-1e9}"))
    before = in_onnx_runtime(ir.to_proto(model))[0]
    run(model, PREPARE)
    assert run(model, PASSES)[0].count == 1
    np.testing.assert_allclose(in_onnx_runtime(ir.to_proto(model))[0], before, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("count", [40, 2000])
def test_long_chains_of_sums_take_no_time(count: int) -> None:
    """Each value is looked at once, and none is far away: 40 sums of a value with itself are 2⁴⁰ ways to the first."""
    sums = " ".join(f"a{i + 1} = Add(a{i}, {'u' if count > 40 else f'a{i}'})" for i in range(count))
    model = _model(
        f"g (float[4,4] a0, float[4,4] u) => (float[4,4] y) {{ {sums} p = Softmax(a{count}) y = MatMul(p, u) }}"
    )
    assert sdpa.apply(model) == 0
    assert not sdpa.left(model)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (masked("float[samples,1,tokens,keys] mask"), "the mask stretches the scores (mask)"),
        (graph(f"{PRODUCT} x = Identity(s) {REST}", "float[one,4,tokens,8] q"), "Q, K and V have unlike batches (q, k"),
    ],
)
def test_axes_of_unlike_names_may_be_stretched(text: str, reason: str) -> None:
    """One of them may be 1, and the other not."""
    assert _left(_model(text))[0].startswith(reason)


def test_calls_of_unlike_batches() -> None:
    """Inside the function the batch has a name, and in one of its calls it is 1 and the mask's is 2."""
    before = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20, "f": 1]>
    g (float[2,4,5,8] q, float[1,4,5,8] r, float[2,1,1,5] mask) => (float[2,4,5,8] y, float[2,4,5,8] z) {
      y = f.F(q, mask) z = f.F(r, mask)
    }
    <domain: "f", opset_import: ["": 20]> F (q, m) => (y) {
      kt = Transpose<perm=[0,1,3,2]>(q) a = MatMul(q, kt) d = Add(a, m) p = Softmax<axis=-1>(d) y = MatMul(p, q)
    }""")
    model = ir.from_proto(before)
    assert _left(model)[0].startswith("the mask stretches the scores (m)")


def test_a_row_that_is_all_masked_is_not_lowered_to_nan(in_onnx_runtime: Execute) -> None:
    """ONNX Runtime's own op would make it so."""
    text = """g (float[batch,tokens,32] q, bool[batch,1,tokens,tokens] yes) => (float[batch,tokens,32] y) {
      no = Not(yes) mask = And(yes, no) zero = Constant<value = float {0}>() low = Constant<value = float {-inf}>()
      m = Where(mask, zero, low) y = Attention<q_num_heads=4, kv_num_heads=4>(q, q, q, m)
    }"""
    model = _model(text)
    run(model, PREPARE)
    assert multi_head_attention.apply(model) == 0
    assert multi_head_attention.left(model)[0].reason.startswith("the mask may be infinite")
    assert not in_onnx_runtime(ir.to_proto(model))[0].any()


def test_heads_that_a_call_gives_are_left() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 11, opset_import: ["": 23, "f": 1]>
    g (float[b,n,64] q) => (float[b,n,64] y) { y = f.F<h=4>(q) }
    <domain: "f", opset_import: ["": 23]> F <h>(q) => (y) {
      y = Attention<q_num_heads: int = @h, kv_num_heads: int = @h>(q, q, q)
    }""")
    )
    run(model, PREPARE)
    assert multi_head_attention.apply(model) == 0
    assert multi_head_attention.left(model)[0].reason.startswith("its heads or scale differ from call to call")
