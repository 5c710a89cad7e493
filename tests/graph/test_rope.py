"""RoPE becomes one op, wherever it is exactly that; and what dialects make of the op."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.census import check_census
from mmdit_deploy.graph.fuse import FUSE, PREPARE
from mmdit_deploy.graph.fuse.rotary.rope import rope
from mmdit_deploy.graph.lower.rope_spelled_out import rope_spelled_out
from mmdit_deploy.graph.lower.rotary_embedding import rotary_embedding
from mmdit_deploy.graph.passes import Pass, run
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec
from traces import Traces

SUBJECT = "rope"
FIXTURES = Path(__file__).parent / "fixtures"
REASONS = {
    "the-other-way": "it is turned the other way (x)",
    "reflected": "its signs are not those of a rotation (x)",
    "halves-for-neighbours": "both channels of a pair are not shown to have one cosine and one sine (x)",
    "cos-for-sin-in-one": "both channels of a pair are not shown to have one cosine and one sine (x)",
    "another-tensor": "not every channel is the sum of two products with its channels (exp)",
    "by-head": "its angles differ between heads (x)",
}
HALF = {"rtol": 2**-10, "atol": 1e-6}  # one rounding, of fp32 numbers that differ in their last bits
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def parse(text: str) -> ir.Model:
    """A model in ONNX's own textual form, ready for rules."""
    header = '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>\n'
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    run(model, PREPARE)
    return model


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def spelled(name: str) -> ir.Model:
    """A fixture, ready for rules."""
    model = ir.load(FIXTURES / SUBJECT / name)
    run(model, PREPARE)
    return model


def turned(body: str, more: str = "", shape: str = "B,N,2,4") -> str:
    """A graph that turns x, with what its spellings need."""
    return f"""g (float[{shape}] x, float[N,2] c, float[N,2] s) => (float[{shape}] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] four = {{4}},
         int64[1] last = {{-1}} {more}> {{ {body} }}"""


# x's halves, turned; tables of constant angles at full width
HALVES = "a = Slice(x, zero, two, last) b = Slice(x, two, four, last) n = Neg(b) r = Concat<axis=-1>(n, a)"
BY_TABLE = f"{HALVES} xc = Mul(x, cos) rs = Mul(r, sin) y = Add(xc, rs)"


def table(*rows: str, name: str) -> str:
    return f", float[{len(rows)},1,4] {name} = {{{','.join(rows)}}}"


SAME = table("1,2,1,2", "3,4,3,4", "5,6,5,6", name="cos") + table("7,8,7,8", "1,3,1,3", "0,9,0,9", name="sin")
ONE_DIFFERS = SAME.replace("0,9,0,9", "0,9,0,8")


@pytest.fixture
def numbers_agree(in_onnx_runtime: Callable[[onnx.ModelProto], list[np.ndarray]]) -> Callable[..., None]:
    """Check that a pass fires so many times, and keeps numbers."""

    def check(model: ir.Model, step: Pass, count: int, **tolerance: float) -> None:
        before = in_onnx_runtime(ir.to_proto(model))
        assert step.apply(model) == count, step.left(model)
        after = ir.to_proto(model)
        onnx.checker.check_model(after, full_check=not any(n.domain == "com.microsoft" for n in model.graph))
        for mine, theirs in zip(in_onnx_runtime(after), before, strict=True):
            np.testing.assert_allclose(mine, theirs, **(tolerance or EXACT))
        assert step.apply(model) == 0
        assert ir.to_proto(model) == after

    return check


def test_every_spelling(spelling: Any, check_spelling: Callable[..., None]) -> None:
    check_spelling(spelling, (rope,), **(HALF if "fp16" in spelling.path.name else EXACT))


def test_a_near_miss_says_why(spelling: Any) -> None:
    name = spelling.path.name.split(".")[0]
    left = [x.reason for x in rope.left(spelled(spelling.path.name))]
    if name.startswith("near-miss"):
        assert left == [REASONS[name.removeprefix("near-miss-")]]
    elif name != "gpt-neox":
        assert not rope.left(fused := spelled(spelling.path.name)) and ops(fused)["RotaryEmbedding"] == 0


def test_every_exporter_of_whole_models() -> None:
    """Q and K of each attention of FLUX.1 and FLUX.2, and of both streams of Qwen-Image's."""
    expected = {"flux1": 6, "flux2": 6, "qwen-image": 8, "qwen-image-masked": 8}
    files = json.loads((FIXTURES / "models" / "index.json").read_text())["files"]
    for file in files:
        name = file.split(".dynamo")[0].split(".torchscript")[0].split(".optimum")[0]
        model = ir.from_proto(onnx.load_from_string(gzip.decompress((FIXTURES / "models" / file).read_bytes())))
        run(model, PREPARE)
        assert rope.apply(model) == expected.get(name, 0), file
        assert ops(model)["RotaryEmbedding"] == expected.get(name, 0), file
        assert rope.left(model) == (), file


@pytest.mark.parametrize(("name", "dtype"), [("flux1", "bfloat16"), ("qwen-image", "float32")])
def test_our_own_blocks(tiny_families: Mapping[str, ModelSpec], traces: Traces, name: str, dtype: str) -> None:
    """Q and K of every attention, by one pair of tables, in fp32."""
    import torch

    spec = tiny_families[name]
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=11)
    functions = traces.functions(spec, calls(spec), getattr(torch, dtype)).values()
    model.functions.update({f.identifier(): f.clone() for f in functions})
    rope.apply(model)
    assert any(node.op_type == "RotaryEmbedding" for function in model.functions.values() for node in function)
    for kind, function in model.functions.items():
        found = Counter(node.op_type for node in function)
        turns = [node for node in function if node.op_type == "RotaryEmbedding"]
        assert len(turns) == 2 * found["Attention"], kind
        assert len({(node.inputs[1], node.inputs[2]) for node in turns}) == min(len(turns), 1), kind
        assert {node.inputs[0].dtype for node in turns} <= {ir.DataType.FLOAT}, kind


def test_a_rope_that_is_not_fused_is_an_error() -> None:
    model = spelled("ours.dynamo-18.onnx")
    with pytest.raises(GraphError, match="RotaryEmbedding: expected 1, found 0"):
        check_census(model, {"RotaryEmbedding": 1}, "standard")


def test_in_a_local_function(in_onnx_runtime: Callable[[onnx.ModelProto], list[np.ndarray]]) -> None:
    model = spelled("ours-fp16.dynamo-18.onnx")
    before = in_onnx_runtime(ir.to_proto(model))
    graph = model.graph
    for name, value in list(graph.initializers.items()):  # a function has none
        constant = ir.node("Constant", [], attributes={"value": value.const_value})
        graph.insert_before(graph[0], constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        del graph.initializers[name]
    values = [[ir.Value(name=v.name, shape=v.shape, type=v.type) for v in of] for of in (graph.inputs, graph.outputs)]
    call = ir.Node("local", "Turn", values[0], outputs=values[1])
    outer = ir.Graph(values[0], values[1], nodes=[call], opset_imports={"": 23, "local": 1}, name="outer")
    model = ir.Model(outer, ir_version=11)
    model.functions["local", "Turn", ""] = ir.Function("local", "Turn", graph=graph, attributes=[])
    assert rope.apply(model) == 1
    assert rope.apply(model) == 0
    np.testing.assert_allclose(in_onnx_runtime(ir.to_proto(model))[0], before[0], **HALF)


def test_a_table_whose_halves_are_equal(numbers_agree: Callable[..., None]) -> None:
    model = parse(turned(BY_TABLE, SAME, "B,3,2,4"))
    numbers_agree(model, rope, 1)
    assert ops(model)["Slice"] == 2  # of the tables


def test_a_table_of_which_one_number_differs() -> None:
    model = parse(turned(BY_TABLE, ONE_DIFFERS, "B,3,2,4"))
    assert rope.apply(model) == 0
    (left,) = rope.left(model)
    assert left.reason == "both channels of a pair are not shown to have one cosine and one sine (x)"


OTHERS = {
    "a difference": ("m = Concat<axis=-1>(b, n2)", "y = Sub(xc, rs)"),
    "factors and summands in another order": ("m = Concat<axis=-1>(n, a)", "y = Add(rs, xc)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_orders(name: str, numbers_agree: Callable[..., None]) -> None:
    moved, last = OTHERS[name]
    body = f"""{HALVES} n2 = Neg(a) {moved} c1 = Unsqueeze(c, one) s1 = Unsqueeze(s, one)
        cos = Concat<axis=-1>(c1, c1) sin = Concat<axis=-1>(s1, s1) xc = Mul(cos, x) rs = Mul(m, sin) {last}"""
    model = parse(turned(body))
    numbers_agree(model, rope, 1)
    assert not {"Concat"} & {n.op_type for n in model.graph if n.outputs[0].dtype == ir.DataType.FLOAT}


SHIFTED = """a = Slice(x, zero, two, last) b = Slice(x, two, four, last) c1 = Unsqueeze(c, one) s1 = Unsqueeze(s, one)
    ac = Mul(a, c1) bs = Mul(b, s1) bc = Mul(b, c2) as1 = Mul(a, s1) p = Sub(ac, bs) q = Add(bc, as1)
    y = Concat<axis=-1>(p, q)"""


@pytest.mark.parametrize(
    ("cosine", "tokens", "reason"),
    [
        # of the token before
        (
            """f = Slice(c, zero, one, zero) m = Constant<value_ints=[-1]>() g = Slice(c, zero, m, zero)
            t = Concat<axis=0>(f, g) c2 = Unsqueeze(t, one)""",
            "N",
            "one cosine and one sine",
        ),
        # by head, where the other is by token: only with as many heads as tokens do both broadcast
        ("c2 = Unsqueeze(c, zero)", "2", "of other axes"),
        # rounded
        ("h = Cast<to=10>(c1) c2 = Cast<to=1>(h)", "N", "one cosine and one sine"),
    ],
)
def test_cosines_of_a_pair_that_differ(cosine: str, tokens: str, reason: str) -> None:
    body = SHIFTED.replace("ac = Mul", f"{cosine} ac = Mul", 1)
    model = parse(turned(body).replace("[B,N,", f"[B,{tokens},").replace("[N,2]", f"[{tokens},2]"))
    assert rope.apply(model) == 0
    (left,) = rope.left(model)
    assert reason in left.reason


@pytest.mark.parametrize(
    ("x", "angles"),
    [
        ("B,2,N,4", "T,2"),  # N may be 1
        ("B,2,N,4", "E,1,N,2"),  # B may be 1
        ("B,N,2,4", "E,N,1,2"),
    ],
)
def test_angles_that_may_stretch_x(x: str, angles: str) -> None:
    """Of dims of two names one may be 1 and broadcast, x's too: RotaryEmbedding does not."""
    body = f"""{HALVES} cos = Concat<axis=-1>(c, c) sin = Concat<axis=-1>(s, s)
        xc = Mul(x, cos) rs = Mul(r, sin) y = Add(xc, rs)"""
    fires = turned(body, shape=x).replace("[N,2]", f"[{angles.replace('T', 'N').replace('E', 'B')}]")
    assert rope.apply(parse(fires)) == 1
    model = parse(
        turned(body, shape=x).replace("[N,2]", f"[{angles}]").replace(f"(float[{x}] y)", "(float[I,J,K,4] y)")
    )
    assert rope.apply(model) == 0
    (left,) = rope.left(model)
    assert left.reason == "its angles are for other tokens, or other samples (x)"


@pytest.mark.parametrize("given", ["Split<axis: int = @axis, num_outputs = 2>", "Concat<axis: int = @axis>"])
def test_what_a_call_gives_is_not_known(given: str, in_onnx_runtime: Callable[..., list[np.ndarray]]) -> None:
    """Along which axis a function splits x, say."""
    body = "a, b = Split<axis = -1, num_outputs = 2>(x) n = Neg(b) r = Concat<axis = -1>(n, a)"
    op = given.split("<")[0]
    start = body.index(op)
    body = body[:start] + given + body[body.index(">", start) + 1 :]
    text = f"""g (float[B,2,N,4] x, float[N,4] c, float[N,4] s) => (float[B,2,N,4] y) {{
          y = local.Turn<axis = -1>(x, c, s)
        }}
        <domain: "local", opset_import: ["": 23]> Turn <axis> (x, c, s) => (y) {{
          {body} xc = Mul(x, c) rs = Mul(r, s) y = Add(xc, rs)
        }}"""
    proto = onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 23, "local": 1]>\n' + text)
    model = ir.from_proto(proto)
    run(model, PREPARE)
    for step in FUSE:
        assert step.apply(model) == 0
    np.testing.assert_array_equal(in_onnx_runtime(ir.to_proto(model))[0], in_onnx_runtime(proto)[0])


def test_double_precision_stays() -> None:
    model = parse(turned(SHIFTED.replace("c2", "c1")).replace("float[", "double["))
    assert rope.apply(model) == 0
    (left,) = rope.left(model)
    assert left.reason == "it is turned in DOUBLE, which RotaryEmbedding does not take (x)"


def test_what_is_no_rope_is_not_spoken_of() -> None:
    """A norm's scale and shift, an interpolation, a gate: sums of products, too."""
    model = parse(turned("u = Unsqueeze(c, one) v = Concat<axis=-1>(u, u) p = Mul(x, v) q = Mul(x, x) y = Add(p, q)"))
    assert rope.apply(model) == 0
    assert rope.left(model) == ()


def test_a_graph_made_to_take_long() -> None:
    """Channels that double forty times, in number and in depth: neither is followed."""
    deep = " ".join(f"d{i + 1} = Mul(d{i}, d{i})" for i in range(40))
    wide = " ".join(f"w{i + 1} = Concat<axis=-1>(w{i}, w{i})" for i in range(40))
    body = SHIFTED.replace(
        "ac = Mul", f"d0 = Identity(c1) {deep} w0 = Identity(c) {wide} c2 = Identity(d40) ac = Mul", 1
    )
    model = parse(turned(body))
    assert rope.apply(model) == 0
    (left,) = rope.left(model)
    assert "one cosine and one sine" in left.reason


def embedding(attributes: str, x: str = "B,N,8", cos: str = "N,2", more: str = "", table: str = "") -> str:
    """A RotaryEmbedding whose cosines and sines are expanded for each sample."""
    expand = "z = Shape<end=1>(x) n = Shape<end=1>(c) o = Constant<value_ints=[1]>() e = Concat<axis=0>(z, n, o)"
    expand += " ce = Expand(c, e) se = Expand(s, e)" if not table else ""
    names = table or "ce, se"
    return f"""g (float[{x}] x, float[{cos}] c, float[{cos}] s{more}) => (float[{x}] y) {{
        {expand} y = RotaryEmbedding<{attributes}>(x, {names}) }}"""


EMBEDDINGS = {
    "neighbours, heads last": embedding("interleaved=1, num_heads=2"),
    "halves, heads last": embedding("num_heads=2"),
    "neighbours, heads first": embedding("interleaved=1", x="B,2,N,4"),
    "halves, heads first": embedding("interleaved=0", x="B,2,N,4"),
    "partial, heads last": embedding("interleaved=1, num_heads=2, rotary_embedding_dim=2", cos="N,1"),
    "partial, heads first": embedding("rotary_embedding_dim=2", x="B,2,N,4", cos="N,1"),
}
BY_SAMPLE = embedding("interleaved=1, num_heads=2", cos="B,N,2", table="c, s")
BY_POSITION = embedding("num_heads=2", cos="9,2", more=", int64[B,N] p", table="c, s, p")


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_in_onnx_runtimes_own_op(name: str, numbers_agree: Callable[..., None]) -> None:
    model = parse(EMBEDDINGS[name])
    numbers_agree(model, rotary_embedding, 1)
    (node,) = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert node.domain == "com.microsoft"
    assert ops(model)["Expand"] == 0
    assert [v.name for v in node.inputs[2:]] == ["c", "s"]


def test_angles_by_sample_stay_in_the_standard_op() -> None:
    model = parse(BY_SAMPLE)
    assert rotary_embedding.apply(model) == 0
    (left,) = rotary_embedding.left(model)
    assert left.reason == "not one table for all samples (c)"


@pytest.mark.parametrize("name", [*EMBEDDINGS, "by sample"])
def test_spelled_out(name: str, numbers_agree: Callable[..., None]) -> None:
    model = parse({**EMBEDDINGS, "by sample": BY_SAMPLE}[name])
    numbers_agree(model, rope_spelled_out, 1)
    assert not {"RotaryEmbedding", "Expand"} & set(ops(model))
    assert all(v.dtype is not None for node in model.graph for v in node.outputs if node.op_type in ("Mul", "Add"))


def test_spelled_out_by_position(in_onnx_runtime: Callable[[onnx.ModelProto], list[np.ndarray]]) -> None:
    model = parse(
        BY_POSITION.replace("int64[B,N] p", "float[B,N] f").replace("y = R", "a = Abs(f) p = Cast<to=7>(a) y = R")
    )
    before = in_onnx_runtime(ir.to_proto(model))
    assert rope_spelled_out.apply(model) == 1
    np.testing.assert_allclose(in_onnx_runtime(ir.to_proto(model))[0], before[0], **EXACT)


@pytest.mark.parametrize("attribute", ["interleaved", "num_heads", "rotary_embedding_dim"])
def test_what_a_call_gives_is_not_spelled_out(attribute: str) -> None:
    others = {"interleaved": 1, "num_heads": 2, "rotary_embedding_dim": 2}
    given = ", ".join(f"{n} = {v}" if n != attribute else f"{n}: int = @{n}" for n, v in others.items())
    text = f"""g (float[B,N,8] x, float[B,N,1] c, float[B,N,1] s) => (float[B,N,8] y) {{
          y = local.Turn<{attribute} = {others[attribute]}>(x, c, s)
        }}
        <domain: "local", opset_import: ["": 23]> Turn <{attribute}> (x, c, s) => (y) {{
          y = RotaryEmbedding<{given}>(x, c, s)
        }}"""
    model = ir.from_proto(onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 23, "local": 1]>\n' + text))
    run(model, PREPARE)
    assert rope_spelled_out.apply(model) == 0
    (left,) = rope_spelled_out.left(model)
    assert left.reason.startswith(f"its {attribute} is given by each call of the function around it")


@pytest.mark.parametrize("lowering", [rotary_embedding, rope_spelled_out], ids=lambda p: p.name)
def test_there_and_back(spelling: Any, lowering: Pass, numbers_agree: Callable[..., None]) -> None:
    """Every spelling, fused, in each dialect."""
    model = spelled(spelling.path.name)
    rope.apply(model)
    count = ops(model)["RotaryEmbedding"]
    by_sample = any(len(n.inputs[1].producer().inputs) != 2 for n in model.graph if n.op_type == "RotaryEmbedding")
    tolerance = HALF if "fp16" in spelling.path.name else EXACT
    numbers_agree(model, lowering, 0 if by_sample and lowering is rotary_embedding else count, **tolerance)
