"""Graphs that are no MMDiT's: where nothing matches a file stays; where something does it computes the same."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from mmdit_deploy.graph.function_types import callers_first, type_function_inputs
from mmdit_deploy.graph.fuse import CLEAN, FUSE, PREPARE
from mmdit_deploy.graph.fuse.interface import kept_interface
from mmdit_deploy.graph.fuse.shapes import shapes
from mmdit_deploy.graph.optimize import optimize_file
from mmdit_deploy.graph.passes import run

FIXTURES = Path(__file__).parent / "fixtures" / "foreign"
FILES = tuple(json.loads((FIXTURES / "index.json").read_text())["files"])
# Both have as many attentions as layers.
ATTENTIONS = {"resnet": 0, "bert": 2, "llama": 2}
SIZES = {"batch": 2, "tokens": 5, "past": 3, "B": 2, "N": 5}


def execute(model: onnx.ModelProto, given: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """All outputs in ONNX Runtime, as written, for inputs made from a seed: ids are few, masks have a last token."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    inputs = {}
    for i in session.get_inputs():
        shape = [SIZES.get(d, d) for d in i.shape]
        if i.type == "tensor(int64)":
            inputs[i.name] = generator.integers(0, 2 if "mask" in i.name else 11, shape)
        else:
            inputs[i.name] = np.asarray(generator.standard_normal(shape)).astype("float32")
            if i.type != "tensor(float)":
                inputs[i.name] = (inputs[i.name] > -9).astype(
                    {"tensor(bool)": "bool", "tensor(uint8)": "uint8"}[i.type]
                )
    return session.run(None, inputs | (given or {}))


def load(file: str) -> onnx.ModelProto:
    return onnx.load_from_string(gzip.decompress((FIXTURES / file).read_bytes()))


def fuse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As `optimize_file` does it, in this process; a second round does nothing."""
    model = ir.from_proto(proto)
    with kept_interface(model):
        run(model, PREPARE)
        assert any(step.count for step in run(model, FUSE))
        run(model, CLEAN)
        again = [step for step in run(model, (*PREPARE, *FUSE, *CLEAN)) if step.count]
        assert not again
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return after


def assert_same(mine: onnx.ModelProto, theirs: onnx.ModelProto, given: dict[str, np.ndarray] | None = None) -> None:
    for a, b in zip(execute(mine, given), execute(theirs, given), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", FILES)
def test_others_models(file: str, tmp_path: Path) -> None:
    before = load(file)
    onnx.save(before, tmp_path / "in.onnx")
    optimize_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    attentions = ATTENTIONS[file.partition(".")[0]]
    assert Counter(node.op_type for node in after.graph.node)["Attention"] == attentions
    assert (after == before) == (attentions == 0)  # its opset too
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert_same(after, before)


# A SiLU, so that something fires, and around it what has to survive.
SILU = "s = Sigmoid(x) z = Mul(x, s)"
SURVIVE = {
    "If": (
        f"""g (bool c, float[B,4] x) => (float[B,4] y) {{
            {SILU}
            y = If (c) <then_branch = t () => (float[B,4] p) {{ u = Sigmoid(z) p = Mul(z, u) }},
                        else_branch = e () => (float[B,4] q) {{ v = Exp(x) w = Exp(x) q = Sub(v, w) }}>
        }}""",
        {"If": 1},
    ),
    "Loop that makes its value longer": (
        f"""g (float[B,4] x) => (float[N,4] y) <int64 n = {{3}}, bool t = {{1}}> {{
            {SILU}
            y = Loop (n, t, z) <body = l (int64 i, bool go, u) => (bool on, float[M,4] o) {{
                on = Identity(go) h = Shape(u) r = Reshape(u, h) o = Concat<axis = 0>(r, x) }}>
        }}""",
        {"Loop": 1},
    ),
    "Scan": (
        f"""g (float[4] a, float[B,4] x) => (float[4] y, float[B,4] w) {{
            {SILU}
            y, w = Scan <num_scan_inputs = 1, body = b (float[4] u, float[4] v) => (float[4] p, float[4] q) {{
                p = Add(u, v) s2 = Sigmoid(p) q = Mul(p, s2) }}> (a, z)
        }}""",
        {"Scan": 1},
    ),
    "sequences": (
        f"""g (float[B,4] x) => (float[B,8] y) {{
            {SILU}
            q = SequenceConstruct(z, x) r = Identity(q) y = ConcatFromSequence<axis = 1>(r)
        }}""",
        {"SequenceConstruct": 1, "ConcatFromSequence": 1},
    ),
    "quantized ops": (
        f"""g (float[B,4] x) => (float[B,4] y) <float e = {{0.1}}, uint8 o = {{128}}> {{
            {SILU}
            q = QuantizeLinear(z, e, o) d = DequantizeLinear(q, e, o) f, u, v = DynamicQuantizeLinear(d)
            y = DequantizeLinear(f, u, v)
        }}""",
        {"QuantizeLinear": 1, "DequantizeLinear": 2, "DynamicQuantizeLinear": 1},
    ),
    "others' ops": (
        f"""g (float[B,4] x) => (float[B,4] y) <float[4] w = {{1,2,3,4}}> {{
            {SILU}
            a = com.microsoft.QuickGelu<alpha = 1.7>(z) b = com.microsoft.QuickGelu<alpha = 1.7>(z) c = Add(a, b)
            y = com.microsoft.BiasGelu(c, w)
        }}""",
        {"QuickGelu": 2, "BiasGelu": 1},
    ),
}


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("name", SURVIVE)
def test_survives(name: str, opset: int) -> None:
    text, wanted = SURVIVE[name]
    before = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>\n{text}')
    after = ir.from_proto(fuse(before))
    found = Counter(node.op_type for node in after.graph)
    assert {op: found[op] for op in wanted} == wanted
    for condition in (True, False) if name == "If" else (None,):
        given = None if condition is None else {"c": np.array(condition)}
        assert_same(ir.to_proto(after), before, given)


def test_training_survives() -> None:
    """Its statistics too."""
    text = """g (float[B,3,4] x, float[3] w) => (float[B,3,4] y, float[3] m, float[3] v) {
        s = Sigmoid(x) z = Mul(x, s) a = Exp(w)
        y, m, v = BatchNormalization<training_mode = 1>(z, w, w, w, a)
    }"""
    before = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 15]>\n{text}')
    assert_same(fuse(before), before)


def test_a_default_stays_one_that_a_caller_may_replace() -> None:
    text = "g (float[B,4] x, float[1] scale) => (float[B,4] y) <float[1] scale = {1.0}> {"
    before = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]>\n{text} s = Sigmoid(x) z = Mul(x, s) y = Mul(z, scale) }}'
    )
    after = fuse(before)
    assert list(after.graph.input) == list(before.graph.input)
    other = {"scale": np.full(1, 3, np.float32)}
    np.testing.assert_allclose(execute(after, other)[0], execute(before, other)[0], rtol=1e-6)
    np.testing.assert_allclose(execute(after, other)[0], 3 * execute(after)[0], rtol=1e-6)


def declared(model: onnx.ModelProto, **dims: list[int | str]) -> onnx.ModelProto:
    """With what the file says of values in between."""
    for name, shape in dims.items():
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return model


def dims(model: ir.Model) -> dict[str, list[object]]:
    values = [v for node in model.graph for v in node.outputs]
    return {
        v.name or "": [d if isinstance(d, int) else d.value for d in v.shape] for v in values if v.shape is not None
    }


def graph(text: str, opset: int = 23) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}, "local": 1]>\n{text}')


def test_wrong_shapes_in_the_file_do_not_mislead() -> None:
    """By them the Expand does nothing, and the batch is the one of the example."""
    text = """g (float[B,4] x) => (float[M,4] y) <int64[2] to = {3, 4}> {
        a = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(x) e = Expand(a, to) s = Sigmoid(e) z = Mul(e, s)
        n = Neg(x) y = Concat<axis = 0>(z, n)
    }"""
    before = declared(graph(text), a=[3, 4], n=[7, 4])
    model = ir.from_proto(before)
    shapes.apply(model)
    assert dims(model)["a"] == [1, 1]
    assert dims(model)["n"] == ["B", 4]
    assert_same(fuse(before), before)


def test_what_only_the_file_says_counts() -> None:
    """Of an op that nobody knows, and of what is made of it."""
    text = "g (float[B,4] x) => (float[B,4] y) { a = local.Unknown(x) y = Neg(a) }"
    model = ir.from_proto(declared(graph(text), a=["B", 4]))
    shapes.apply(model)
    assert dims(model)["a"] == ["B", 4]
    assert shapes.apply(model) == 0


def test_a_node_that_cannot_be_right_hides_nothing_else() -> None:
    text = """g (float[B,4] x, float[B,5] w) => (float[B,4] y) {
        a = Neg(x) b = Add(a, w) c = Neg(b) d = Neg(w) d2 = Add(d, a) e = Exp(x) y = Neg(e)
    }"""
    model = ir.from_proto(graph(text))
    shapes.apply(model)
    found = dims(model)
    assert found["a"] == found["e"] == found["y"] == ["B", 4]
    assert found["d"] == ["B", 5]
    assert not found.keys() & {"b", "c", "d2"}


def test_names_of_dims_that_are_no_names() -> None:
    text = 'g (float["batch:size?",4] x) => (float[M,4] y) { a = Concat<axis = 0>(x, x) y = Neg(a) }'
    proto = graph(text.replace('"batch:size?"', "B"))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch:size?"
    model = ir.from_proto(proto)
    run(model, (*PREPARE, *FUSE))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_stream_cut_off_has_a_length() -> None:
    """As after SD3's joint attention: what is behind the image's tokens is as long as the text's."""
    text = """g (float[B,img,8] x, float[B,txt,8] z) => (float[B,t2,8] y, float[B,i2,8] w)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {9223372036854775807}> {
        j = Concat<axis = 1>(x, z) h = Shape(x) n = Slice(h, one, two, zero)
        a = Slice(j, n, end, one) b = Slice(j, zero, n, one) y = Neg(a) w = Neg(b)
    }"""
    model = ir.from_proto(graph(text))
    shapes.apply(model)
    assert dims(model)["a"] == ["B", "txt", 8]
    assert dims(model)["b"] == ["B", "img", 8]


def test_a_cut_is_no_longer_than_what_is_cut() -> None:
    text = """g (float[B,N,8] x) => (float[B,M,8] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] hundred = {100}> { y = Slice(x, zero, hundred, one) }"""
    model = ir.from_proto(graph(text))
    shapes.apply(model)
    assert dims(model)["y"] == ["B", "Min(100, N)", 8]


FUNCTIONS = """g (float[B,img,8] x, float[B,txt,8] z, float[B,8] c)
    => (float[B,img,8] y, float[B,txt,8] w, float[B,8] v) {
    a = Neg(x)
    y, u = local.f(a, x, c)
    w, v = local.f(z, z, c)
}
<domain: "local", opset_import: ["": 23, "local": 1]> f (p, q, r) => (s, t) {
    b = Add(p, q)
    s = local.h(b)
    t = Neg(r)
}
<domain: "local", opset_import: ["": 23]> h (p) => (q) { q = Exp(p) }
"""


def test_functions_are_typed_from_their_calls() -> None:
    """Where calls differ what they have in common stays: two inputs are equally long, whatever that is."""
    model = ir.from_proto(graph(FUNCTIONS))
    shapes.apply(model)
    f, h = model.functions["local", "f", ""], model.functions["local", "h", ""]
    p, q, r = f.inputs
    assert all(v.dtype == ir.DataType.FLOAT for v in (p, q, r, *h.inputs))
    assert p.shape is not None and q.shape is not None and r.shape is not None
    assert list(p.shape) == list(q.shape) == ["B", "f_dim_0", 8]
    assert list(r.shape) == ["B", 8]
    for value in (f[0].outputs[0], *f.outputs[:1], *h.inputs, *h.outputs):
        assert value.shape is not None and list(value.shape) == ["B", "f_dim_0", 8]
    assert shapes.apply(model) == 0


def test_functions_of_unlike_calls() -> None:
    """Of other types and ranks nothing is known; an input that one call leaves out is not typed."""
    text = """g (float[B,8] x, float16[B,8] z) => (float[B,8] y, float16[B,8] w) { y = local.f(x, x) w = local.f(z) }
    <domain: "local", opset_import: ["": 23]> f (p, q) => (r) { r = Neg(p) }"""
    model = ir.from_proto(graph(text))
    type_function_inputs(model, callers_first(model))
    p, q = model.functions["local", "f", ""].inputs
    assert p.type is None and p.shape is not None and list(p.shape) == ["B", 8]
    assert q.type is None and q.shape is None
