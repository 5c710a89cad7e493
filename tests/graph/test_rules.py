"""Each rewrite rule: it fires, a near miss stays, a second run changes nothing, numbers agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.graph.fuse.attention.attention_layout import attention_layout
from mmdit_deploy.graph.lower.adaln import adaln
from mmdit_deploy.graph.lower.linear import linear
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.lower.multi_head_attention import MICROSOFT, multi_head_attention
from mmdit_deploy.graph.named_functions import DOMAIN, define
from mmdit_deploy.graph.passes import Pass

SIZES = {"B": 2, "N": 5, "M": 3}


def parse(text: str) -> ir.Model:
    """A model in ONNX's own textual form, with the shapes that ONNX infers."""
    header = f'<ir_version: 11, opset_import: ["": 23, "{MICROSOFT}": 1, "{DOMAIN}": 1]>\n'
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    define(model)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))


def execute(model: ir.Model) -> np.ndarray:
    """The first output in ONNX Runtime, for fixed random inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As written: ONNX Runtime's own rewrites must not stand in for ours.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    inputs = {
        i.name: generator.standard_normal([SIZES.get(d, d) for d in i.shape], dtype=np.float32).astype(
            np.bool_ if i.type == "tensor(bool)" else np.float32
        )
        for i in session.get_inputs()
    }
    (first, *_) = session.run(None, inputs)
    return np.asarray(first)


def evaluate(model: ir.Model) -> np.ndarray:
    """The first output in ONNX's reference evaluator, for what ONNX Runtime has no kernel for."""
    generator = np.random.default_rng(0)
    inputs = {
        i.name: generator.standard_normal([d if isinstance(d, int) else SIZES[str(d)] for d in i.shape or ()])
        for i in model.graph.inputs
    }
    session = ReferenceEvaluator(ir.to_proto(model))
    return np.asarray(session.run(None, {name: v.astype(np.float32) for name, v in inputs.items()})[0])


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def attention(reshape: str, attributes: str = "", mask: str = "") -> str:
    """Attention between transposes, with the shape of the last Reshape, and the type of a mask."""
    more, extra = (f", {mask} mask", ", mask") if mask else ("", "")
    return f"""g (float[B,N,2,8] q, float[B,M,2,8] k, float[B,M,2,8] v{more})
        => (float[B,N,16] y) <int64[3] shape = {reshape}> {{
      qt = Transpose<perm=[0,2,1,3]>(q)
      kt = Transpose<perm=[0,2,1,3]>(k)
      vt = Transpose<perm=[0,2,1,3]>(v)
      a = Attention{attributes}(qt, kt, vt{extra})
      t = Transpose<perm=[0,2,1,3]>(a)
      y = Reshape(t, shape)
    }}"""


def flat_attention(attributes: str, mask: str = "") -> str:
    more, extra = (f", {mask} mask", ", mask") if mask else ("", "")
    return f"""g (float[B,N,16] q, float[B,M,16] k, float[B,M,16] v{more})
        => (float[B,N,16] y) {{ y = Attention<{attributes}>(q, k, v{extra}) }}"""


def finite_mask(made: str) -> str:
    text = flat_attention("q_num_heads=2, kv_num_heads=2", mask="bool[B,1,N,M]").replace(", mask)", ", m)")
    constants = "zero = Constant<value = float {0}>() low = Constant<value = float {-1e30}>()"
    return text.replace("{ y =", f"<float[B,1,N,M] m> {{ {constants} m = {made} y =")


def key_mask(expanded: str, mask: str = "float[2,1,1,3]") -> str:
    """Attention with a mask that is expanded to a shape."""
    return f"""g (float[2,2,3,8] q, float[2,2,3,8] k, float[2,2,3,8] v, {mask} mask) => (float[2,2,3,8] y)
        <int64[4] shape = {expanded}> {{
      e = Expand(mask, shape)
      y = Attention(q, k, v, e)
    }}"""


def norm(weight: str, scale: str = "float[B,1,8]", shift: str = "float[B,1,8]") -> str:
    return f"""g (float[B,N,8] x, {scale} scale, {shift} shift) => (float[B,N,8] y)
        <float[8] w = {{{weight}}}> {{
      n = LayerNormalization<epsilon=1e-6>(x, w)
      y = mmdit.MMDiTModulate(n, scale, shift)
    }}"""


def dense(x: str = "float[B,N,8]", bias: str = "float[6]", perm: str = "[1,0]", weight: str = "float[6,8]") -> str:
    return f"""g ({x} x, {weight} w, {bias} b) => (float[B,N,6] y) {{
      t = Transpose<perm={perm}>(w)
      m = MatMul(x, t)
      y = Add(m, b)
    }}"""


@dataclass(frozen=True)
class Case:
    """One rule, a graph on which it fires, the ops that are left, and graphs alike that must stay."""

    rule: Pass
    fires: str
    left: Mapping[str, int]
    near_misses: Mapping[str, str]
    run: Callable[[ir.Model], np.ndarray] = execute


CASES = {
    "attention layout": Case(
        attention_layout,
        attention("{0,0,16}"),
        {"Attention": 1, "Reshape": 3, "Constant": 1},
        {
            "causal": attention("{0,0,16}", "<is_causal=1>"),
            "tokens and heads merged": attention("{0,-1,8}").replace("float[B,N,16] y", "float[B,P,8] y"),
            "batch and tokens merged": attention("{1,-1,16}").replace("float[B,N,16] y", "float[1,P,16] y"),
            "transposed otherwise": attention("{0,-1,16}").replace(" t = Transpose<perm=[0,2,1,3]>", " t = Identity"),
        },
    ),
    "attention layout, masked": Case(
        attention_layout,
        attention("{0,0,16}", mask="float[B,1,N,M]"),
        {"Attention": 1, "Reshape": 3, "Constant": 1},
        {"causal": attention("{0,0,16}", "<is_causal=1>", mask="float[B,1,N,M]")},
    ),
    "mask of keys": Case(
        mask_of_keys,
        key_mask("{2,1,3,3}"),
        {"Attention": 1},
        {
            "a mask of pairs": key_mask("{2,1,3,3}", "float[2,1,3,3]"),
            "a mask per head": key_mask("{2,2,3,3}", "float[2,2,1,3]"),
            "a batch spelled out": key_mask("{2,1,3,3}", "float[1,1,1,3]"),
        },
        evaluate,
    ),
    "multi-head attention, masked": Case(
        multi_head_attention,
        finite_mask("Where(mask, zero, low)"),
        {"MultiHeadAttention": 1, "Where": 1, "Constant": 2},
        {
            "a mask that may be infinite": flat_attention("q_num_heads=2, kv_num_heads=2", mask="float[B,1,N,M]"),
            "an infinite mask": finite_mask("Where(mask, zero, inf)").replace(
                "m =", "high = Neg(low) inf = Mul(low, high) m ="
            ),
            "a mask of queries and keys": flat_attention("q_num_heads=2, kv_num_heads=2", mask="float[N,M]"),
            "a bool mask": flat_attention("q_num_heads=2, kv_num_heads=2", mask="bool[B,1,N,M]"),
        },
    ),
    "multi-head attention": Case(
        multi_head_attention,
        flat_attention("q_num_heads=2, kv_num_heads=2"),
        {"MultiHeadAttention": 1},
        {
            "causal": flat_attention("q_num_heads=2, kv_num_heads=2, is_causal=1"),
            "soft-capped": flat_attention("q_num_heads=2, kv_num_heads=2, softcap=2.0"),
            "grouped heads": flat_attention("q_num_heads=4, kv_num_heads=2").replace("float[B,M,16]", "float[B,M,8]"),
            "four axes": attention("{0,0,16}"),
            "fp64": flat_attention("q_num_heads=2, kv_num_heads=2")
            .replace("y = Attention", "a = Cast<to=11>(q) b = Cast<to=11>(k) c = Cast<to=11>(v) z = Attention")
            .replace("(q, k, v) }", "(a, b, c) y = Cast<to=1>(z) }"),
        },
    ),
    "adaptive layer norm": Case(
        adaln,
        norm(",".join(["1"] * 8)),
        {"LayerNormalization": 1, "Add": 1, "Constant": 1},
        {
            "a weight of its own": norm(",".join(["1"] * 7 + ["2"])),
            "a scale per token": norm(",".join(["1"] * 8), scale="float[B,N,8]"),
            "a shift per channel": norm(",".join(["1"] * 8), shift="float[8]"),
            "a scale per batch": norm(",".join(["1"] * 8), scale="float[1,1,8]"),
            "over tokens and channels": norm(",".join(["1"] * 8)).replace("<epsilon", "<axis=1, epsilon"),
        },
    ),
    "linear without transpose": Case(
        linear,
        dense(),
        {"FusedMatMul": 1, "Add": 1},
        {
            "not transposed": dense(perm="[0,1]", weight="float[8,6]"),
            "a vector": dense(x="float[8]").replace("float[B,N,6] y", "float[6] y"),
            "integers": dense()
            .replace("t =", "xi = Cast<to=6>(x) wi = Cast<to=6>(w) t =")
            .replace("(w)\n      m = MatMul(x, t)", "(wi)\n      i = MatMul(xi, t) m = Cast<to=1>(i)"),
            "a batch of matrices": dense(perm="[0,2,1]", weight="float[B,6,8]"),
        },
    ),
}


def uses_contrib_ops(model: ir.Model) -> bool:
    """Whether ONNX's checker lacks the schema of an op, and so cannot infer shapes through it."""
    return any(node.domain == "com.microsoft" for node in model.graph)


@pytest.mark.parametrize("name", CASES)
def test_fires(name: str) -> None:
    case = CASES[name]
    model = parse(case.fires)
    assert case.rule.apply(model) == 1
    assert ops(model) == Counter(case.left)
    onnx.checker.check_model(ir.to_proto(model), full_check=not uses_contrib_ops(model))


@pytest.mark.parametrize(
    ("name", "near_miss"), [(name, near) for name, case in CASES.items() for near in case.near_misses]
)
def test_a_near_miss_stays(name: str, near_miss: str) -> None:
    model = parse(CASES[name].near_misses[near_miss])
    before = ops(model)
    assert CASES[name].rule.apply(model) == 0
    assert ops(model) == before
    if near_miss not in ("causal", "soft-capped"):  # not of these models, and not every kernel takes them
        assert np.isfinite(execute(model)).all()  # a graph that could run: the rule was not spared a broken one


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_changes_nothing(name: str) -> None:
    model = parse(CASES[name].fires)
    CASES[name].rule.apply(model)
    before = ir.to_proto(model)
    assert CASES[name].rule.apply(model) == 0
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("name", CASES)
def test_numbers_agree(name: str) -> None:
    run = CASES[name].run
    model = parse(CASES[name].fires)
    before = run(model)
    CASES[name].rule.apply(model)
    np.testing.assert_allclose(run(model), before, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (attention_layout, attention("{0,0,16}", "<scale=0.1>")),
        (multi_head_attention, flat_attention("q_num_heads=2, kv_num_heads=2, scale=0.1")),
        (adaln, norm(",".join(["1"] * 8)).replace("1e-6", "0.5")),
    ],
)
def test_attributes_are_kept(rule: Pass, text: str) -> None:
    """The scale of an attention and the epsilon of a norm come along."""
    model = parse(text)
    before = execute(model)
    assert rule.apply(model) == 1
    np.testing.assert_allclose(execute(model), before, rtol=2e-5, atol=2e-6)


def test_a_norm_that_is_modulated_twice() -> None:
    """As in a dual-attention block, whose equal norms the exporter merges."""
    text = norm(",".join(["1"] * 8)).replace("(float[B,N,8] y)", "(float[B,N,8] y, float[B,N,8] z)")
    model = parse(text.replace("shift)\n    }", "shift)\n      z = mmdit.MMDiTModulate(n, shift, scale)\n    }"))
    before = execute(model)
    assert adaln.apply(model) == 2
    assert ops(model) == Counter({"LayerNormalization": 2, "Add": 2, "Constant": 2})
    np.testing.assert_allclose(execute(model), before, rtol=2e-5, atol=2e-6)
    assert adaln.apply(model) == 0


def test_shared_values_are_kept() -> None:
    """A transposed weight that something else reads as well stays what it was."""
    text = dense().replace("(float[B,N,6] y)", "(float[B,N,6] y, float[8,6] z)").replace("}", "z = Neg(t) }")
    model = parse(text)
    before = execute(model)
    assert linear.apply(model) == 0
    np.testing.assert_allclose(execute(model), before, rtol=2e-5, atol=2e-6)
