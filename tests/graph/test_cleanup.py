"""Each clean-up pass: it fires, what only looks like it stays, a second run does nothing, and numbers are equal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from mmdit_deploy.graph.fuse import FUSE, PREPARE
from mmdit_deploy.graph.fuse.clean import AFTER, BEFORE, duplicates, transposes, unused
from mmdit_deploy.graph.fuse.clean.casts import casts
from mmdit_deploy.graph.fuse.clean.constants import constants
from mmdit_deploy.graph.fuse.clean.identities import identities
from mmdit_deploy.graph.fuse.shapes import shapes
from mmdit_deploy.graph.passes import Pass

SIZES = {"B": 2, "N": 5}


def parse(text: str, opset: int = 23) -> ir.Model:
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}, "local": 1]>\n{text}')
    result = ir.from_proto(model)
    shapes.apply(result)
    return result


def execute(model: ir.Model) -> list[np.ndarray]:
    """All outputs in ONNX Runtime, as written, for inputs made from a seed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool"}
    inputs = {
        i.name: np.asarray(3 * generator.standard_normal([SIZES.get(d, d) for d in i.shape])).astype(types[i.type])
        for i in session.get_inputs()
    }
    return session.run(None, inputs)


def ops(model: ir.Model) -> Counter[str]:
    """Of the graph, its branches and loop bodies, and its functions; constants aside."""
    scopes = (model.graph, *model.functions.values())
    return Counter(n.op_type for scope in scopes for n in scope.all_nodes() if n.op_type != "Constant")


@dataclass(frozen=True)
class Case:
    """A pass, a graph, how often it fires there, and what ops are left but for constants and Neg."""

    rule: Pass
    text: str
    count: int
    left: dict[str, int] = field(default_factory=dict)


X = "g (float[B,N,4] x) => (float[B,N,4] y)"
FIRES = {
    "arithmetic of constants": Case(
        constants,
        f"{X} <int64 a = {{2}}, int64 b = {{3}}> {{ m = Mod(a, b) f = Cast<to = 1>(m) s = Sqrt(f) y = Mul(x, s) }}",
        3,
        {"Mul": 1},
    ),
    "a static dim of a dynamic shape": Case(
        constants,
        f"{X} <int64 two = {{2}}> {{ h = Shape(x) d = Gather(h, two) f = Cast<to = 1>(d) s = Sqrt(f) y = Div(x, s) }}",
        3,
        {"Div": 1, "Shape": 1},
    ),
    "half of a dim": Case(
        constants,
        f"""{X} <int64[1] zero = {{0}}, int64[1] end = {{9223372036854775807}}, int64[1] two = {{2}},
            int64[1] ax = {{2}}> {{
            h = Shape(x) d = Slice(h, two, end, zero) w = Div(d, two) a = Slice(x, zero, w, ax) b = Slice(x, w, end, ax)
            y = Concat<axis = 2>(b, a) }}""",
        2,
        {"Concat": 1, "Slice": 2, "Shape": 1},
    ),
    "ones of a shape": Case(
        constants,
        f"""{X} <int64[1] n = {{3}}> {{
            e = ConstantOfShape<value = int64[1] {{1}}>(n) z = Expand(x, e) y = Identity(z) }}""",
        1,
        {"Expand": 1, "Identity": 1},
    ),
    "Identity": Case(identities, f"{X} {{ a = Neg(x) b = Identity(a) y = Neg(b) }}", 1),
    "Identity, in a row": Case(identities, f"{X} {{ a = Identity(x) b = Identity(a) y = Neg(b) }}", 2),
    "Dropout": Case(identities, f"{X} {{ a = Dropout(x) y = Neg(a) }}", 1),
    "Dropout, said to be no training": Case(
        identities, f"{X} <float r = {{0.5}}, bool t = {{0}}> {{ a = Dropout(x, r, t) y = Neg(a) }}", 1
    ),
    "Cast to its own type": Case(identities, f"{X} {{ a = Cast<to = 1>(x) y = Neg(a) }}", 1),
    "CastLike its own type": Case(identities, f"{X} {{ a = CastLike(x, x) y = Neg(a) }}", 1),
    "times 1": Case(identities, f"{X} <float one = {{1.0}}> {{ a = Mul(one, x) b = Div(a, one) y = Neg(b) }}", 2),
    "plus 0": Case(identities, f"{X} <float[1] o = {{0.0}}> {{ a = Add(o, x) b = Sub(a, o) y = Neg(b) }}", 2),
    "Transpose": Case(identities, f"{X} {{ a = Transpose<perm = [0,1,2]>(x) y = Neg(a) }}", 1),
    "Reshape to its own shape": Case(
        identities, f"{X} {{ s = Shape(x) a = Reshape(x, s) y = Neg(a) }}", 1, {"Shape": 1}
    ),
    "Reshape to itself, in part": Case(
        identities, f"{X} <int64[3] s = {{0, -1, 4}}> {{ a = Reshape(x, s) y = Neg(a) }}", 1
    ),
    "Expand to its own shape": Case(identities, f"{X} {{ s = Shape(x) a = Expand(x, s) y = Neg(a) }}", 1, {"Shape": 1}),
    "Expand by ones": Case(identities, f"{X} <int64[2] s = {{1, 4}}> {{ a = Expand(x, s) y = Neg(a) }}", 1),
    "Slice of everything": Case(
        identities,
        f"""{X} <int64[1] s = {{0}}, int64[1] e = {{9223372036854775807}}, int64[1] ax = {{1}}> {{
            a = Slice(x, s, e, ax) y = Neg(a) }}""",
        1,
    ),
    "Concat of one": Case(identities, f"{X} {{ a = Concat<axis = 1>(x) y = Neg(a) }}", 1),
    "Tile once": Case(identities, f"{X} <int64[3] r = {{1,1,1}}> {{ a = Tile(x, r) y = Neg(a) }}", 1),
    "Pad by nothing": Case(identities, f"{X} <int64[6] p = {{0,0,0,0,0,0}}> {{ a = Pad(x, p) y = Neg(a) }}", 1),
    "casts that cancel": Case(
        casts,
        "g (float16[B,4] x) => (float16[B,4] y) { a = Cast<to = 1>(x) b = Cast<to = 10>(a) y = Neg(b) }",
        1,
        {"Cast": 1},
    ),
    "one cast for two": Case(
        casts,
        "g (bool[B,4] x) => (float[B,4] y) { a = Cast<to = 7>(x) b = Cast<to = 1>(a) y = Neg(b) }",
        1,
        {"Cast": 2},
    ),
    "transposes that cancel": Case(
        transposes.cancelled,
        f"{X} {{ a = Transpose<perm = [0,2,1]>(x) b = Transpose<perm = [0,2,1]>(a) y = Neg(b) }}",
        1,
        {"Transpose": 1},
    ),
    "transposes in a row": Case(
        transposes.merged,
        """g (float[B,N,4] x) => (float[4,B,N] y) {
            a = Transpose<perm = [0,2,1]>(x) b = Transpose<perm = [1,0,2]>(a) y = Neg(b) }""",
        1,
        {"Transpose": 1},
    ),
    "duplicate initializers": Case(
        duplicates.initializers,
        f"{X} <float[4] a = {{1,2,3,4}}, float[4] b = {{1,2,3,4}}, float[1,4] c = {{1,2,3,4}}> {{"
        " s = Add(x, a) t = Add(s, b) y = Add(t, c) }",
        1,
        {"Add": 3},
    ),
    "a shape twice": Case(
        duplicates.expressions,
        f"""{X} <int64 i = {{1}}> {{
            s = Shape(x) n = Gather(s, i) t = Shape(x) m = Gather(t, i) c = Add(n, m) f = Cast<to = 1>(c) y = Mul(x, f)
        }}""",
        2,
        {"Shape": 1, "Gather": 1, "Add": 1, "Cast": 1, "Mul": 1},
    ),
    "a split twice": Case(
        duplicates.expressions,
        f"""{X} {{ a, b = Split<axis = 2, num_outputs = 2>(x) c, d = Split<axis = 2, num_outputs = 2>(x)
            y = Concat<axis = 2>(d, a) }}""",
        1,
        {"Split": 1, "Concat": 1},
    ),
    "unused nodes": Case(unused.nodes, f"{X} <float[4] w = {{1,2,3,4}}> {{ a = Mul(x, w) b = Exp(a) y = Neg(x) }}", 3),
    "unused functions": Case(
        unused.nodes,
        f"""{X} {{ y = local.f(x) }}
        <domain: "local", opset_import: ["": 23]> f (a) => (b) {{ c = Exp(a) b = Neg(a) }}
        <domain: "local", opset_import: ["": 23, "local": 1]> h (a) => (b) {{ b = local.k(a) }}
        <domain: "local", opset_import: ["": 23]> k (a) => (b) {{ b = Exp(a) }}""",
        3,
        {"f": 1},
    ),
    "in a function": Case(
        identities,
        f"""{X} {{ a = local.f(x) y = local.f(a) }}
        <domain: "local", opset_import: ["": 23]> f (a) => (b) {{
            c = Cast<to = 1>(a) s = Shape(c) d = Reshape(c, s) b = Neg(d) }}""",
        2,
        {"f": 2, "Shape": 1},
    ),
    "constants in a function": Case(
        constants,
        f"""{X} {{ y = local.f(x) }}
        <domain: "local", opset_import: ["": 23]> f (a) => (b) {{
            s = Shape(a) i = Constant<value = int64 {{2}}>() d = Gather(s, i) f = Cast<to = 1>(d) r = Sqrt(f)
            b = Mul(a, r) }}""",
        3,
        {"f": 1, "Shape": 1, "Mul": 1},
    ),
    "in branches and loops": Case(
        duplicates.expressions,
        """g (bool[1] c, float[B,N,4] x) => (float[B,N,4] y) <int64 n = {3}, bool t = {1}> {
            k = Squeeze(c)
            a = If (k) <then_branch = t1 () => (float[B,N,4] p) { q = Exp(x) r = Exp(x) p = Add(q, r) },
                        else_branch = e1 () => (float[B,N,4] p2) { p2 = Identity(x) }>
            b = Loop (n, t, a) <body = l (int64 i, bool go, float[B,N,4] u) => (bool on, float[B,N,4] o) {
                on = Identity(go) v = Tanh(u) w = Tanh(u) o = Add(v, w) }>
            y = Neg(b)
        }""",
        2,
        {"Squeeze": 1, "If": 1, "Exp": 1, "Add": 2, "Identity": 2, "Loop": 1, "Tanh": 1},
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires_and_changes_no_number(name: str) -> None:
    case = FIRES[name]
    model = parse(case.text)
    before = execute(model)
    assert case.rule.apply(model) == case.count
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    for mine, theirs in zip(execute(model), before, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert case.rule.apply(model) == 0
    assert ir.to_proto(model) == after
    left = ops(model)
    del left["Neg"]
    if case.rule is constants:  # what they were made from is left to another pass
        unused.nodes.apply(model)
        left = ops(model)
        wanted = {op: n for op, n in case.left.items() if op != "Shape"}
        assert left == Counter(wanted)
    else:
        assert left == Counter(case.left)


STAYS = {
    "a transposed weight": (
        constants,
        f"{X} <float[4,2] w = {{1,2,3,4,5,6,7,8}}> {{ t = Transpose<perm = [1,0]>(w) m = MatMul(x, w)"
        " y = MatMul(m, t) }",
    ),
    "a weight in another type": (
        constants,
        f"{X} <float16[4] w = {{1,2,3,4}}> {{ c = Cast<to = 1>(w) y = Mul(x, c) }}",
    ),
    "a root of what is negative": (constants, f"{X} <float m = {{-2.0}}> {{ s = Sqrt(m) y = Mul(x, s) }}"),
    "a division by zero": (
        constants,
        f"{X} <float o = {{0.0}}, float i = {{1.0}}> {{ s = Div(i, o) y = Mul(x, s) }}",
    ),
    "random numbers": (constants, f"{X} {{ r = RandomNormal<shape = [1]>() y = Add(x, r) }}"),
    "quantization": (
        constants,
        f"{X} <float v = {{0.3}}, float s = {{0.1}}, uint8 z = {{3}}> {{"
        " q = QuantizeLinear(v, s, z) d = DequantizeLinear(q, s, z) y = Mul(x, d) }",
    ),
    "a dynamic dim": (constants, f"{X} {{ h = Shape<start = 0, end = 1>(x) f = Cast<to = 1>(h) y = Mul(x, f) }}"),
    "the shape of what is cut off somewhere": (
        constants,
        f"""{X} <int64[1] s = {{0}}, int64[1] e = {{100}}, int64[1] ax = {{1}}> {{
            a = Slice(x, s, e, ax) h = Shape(a) c = Cast<to = 1>(h) t = ReduceMax<keepdims = 0>(c) y = Mul(x, t) }}""",
    ),
    "times 1 of more axes": (
        identities,
        "g (float[4] x) => (float[1,4] y) <float[1,1] one = {1.0}> { a = Mul(x, one) y = Neg(a) }",
    ),
    "times ones": (identities, f"{X} <float[4] w = {{1,1,1,1}}> {{ a = Mul(x, w) y = Neg(a) }}"),
    "1 through": (identities, f"{X} <float one = {{1.0}}> {{ a = Div(one, x) y = Neg(a) }}"),
    "0 minus": (identities, f"{X} <float o = {{0.0}}> {{ a = Sub(o, x) y = Neg(a) }}"),
    "backwards": (
        identities,
        f"""{X} <int64[1] s = {{-1}}, int64[1] e = {{-9223372036854775807}}, int64[1] ax = {{1}}> {{
            a = Slice(x, s, e, ax, s) y = Neg(a) }}""",
    ),
    "a Reshape that mixes": (
        identities,
        "g (float[4,4] x) => (float[4,4] y) { a = Transpose<perm = [1,0]>(x) y = Neg(a) }",
    ),
    "a cut that may be one": (
        identities,
        f"""{X} <int64[1] s = {{0}}, int64[1] e = {{7}}, int64[1] ax = {{1}}> {{
            a = Slice(x, s, e, ax) y = Neg(a) }}""",
    ),
    "an Expand by another batch": (
        identities,
        "g (float[1,4] x, float[B,4] z) => (float[B,4] y) { s = Shape(z) a = Expand(x, s) y = Neg(a) }",
    ),
    "Dropout in training": (
        identities,
        f"{X} <float r = {{0.5}}, bool t = {{1}}> {{ a = Dropout(x, r, t) b = Mul(a, r) c = Sub(b, b) y = Add(c, x) }}",
    ),
    "Dropout with a mask": (
        identities,
        f"{X} {{ a, m = Dropout(x) c = Cast<to = 1>(m) y = Mul(a, c) }}",
    ),
    "what names an output": (identities, f"{X} {{ y = Identity(x) }}"),
    "casts that round": (
        casts,
        f"{X} {{ a = Cast<to = 10>(x) b = Cast<to = 1>(a) y = Neg(b) }}",
    ),
    "casts over integers": (casts, f"{X} {{ a = Cast<to = 7>(x) b = Cast<to = 1>(a) y = Neg(b) }}"),
    "transposes that do not cancel": (
        transposes.cancelled,
        "g (float[2,3,4] x) => (float[4,2,3] y) {"
        " a = Transpose<perm = [1,2,0]>(x) b = Transpose<perm = [1,2,0]>(a) y = Neg(b) }",
    ),
    "a Transpose that others read": (
        transposes.merged,
        "g (float[2,3,4] x) => (float[4,2,3] y, float[3,4,2] z) {"
        " a = Transpose<perm = [1,2,0]>(x) b = Transpose<perm = [1,2,0]>(a) y = Neg(b) z = Neg(a) }",
    ),
    "initializers of other types": (
        duplicates.initializers,
        f"{X} <float[1] a = {{0}}, int32[1] b = {{0}}> {{ s = Add(x, a) c = Cast<to = 1>(b) y = Add(s, c) }}",
    ),
    "zeros of two signs": (
        duplicates.initializers,
        f"{X} <float[1] a = {{0.0}}, float[1] b = {{-0.0}}> {{ s = Max(x, a) y = Div(s, b) }}",
    ),
    "two draws": (
        duplicates.expressions,
        f"{X} {{ a = RandomNormalLike(x) b = RandomNormalLike(x) c = Sub(a, b) d = Sub(c, c) y = Add(x, d) }}",
    ),
    "other attributes": (
        duplicates.expressions,
        f"{X} {{ a = Softmax<axis = 1>(x) b = Softmax<axis = 2>(x) y = Add(a, b) }}",
    ),
    "two outputs of one value": (
        duplicates.expressions,
        "g (float[B,4] x) => (float[B,4] y, float[B,4] z) { y = Exp(x) z = Exp(x) }",
    ),
}  # fmt: skip
NO_KERNEL = ("random numbers", "two draws")  # of opset 22, in ONNX Runtime


@pytest.mark.parametrize("name", STAYS)
def test_what_only_looks_like_it_stays(name: str) -> None:
    rule, text = STAYS[name]
    model = parse(text)
    before = ir.to_proto(model)
    if name not in NO_KERNEL:
        execute(model)  # a graph that runs: the pass was not spared a broken one
    assert rule.apply(model) == 0
    assert ir.to_proto(model) == before


def test_weights_outside_are_compared_by_where_they_lie() -> None:
    """The file is not even there."""
    model = parse(f"{X} <float[4] a = {{1,2,3,4}}, float[4] b = {{1,2,3,4}}, float[4] c = {{1,2,3,4}}>"
                  " { s = Mul(x, a) t = Mul(s, b) y = Mul(t, c) }")  # fmt: skip
    for name, offset in (("a", 0), ("b", 0), ("c", 16)):
        tensor = ir.ExternalTensor("nowhere.bin", offset, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name=name)
        model.graph.initializers[name].const_value = tensor
    assert {step.name: n for step in BEFORE[:-1] if (n := step.apply(model))} == {"duplicate initializers": 1}
    assert set(model.graph.initializers) == {"a", "c"}


def test_a_default_of_an_input_is_no_constant() -> None:
    text = "g (float[B,4] x, float one) => (float[B,4] y) <float one = {1.0}> { a = Mul(x, one) y = Neg(a) }"
    model = parse(text)
    assert model.graph.inputs[1].is_initializer()
    assert not any(step.apply(model) for step in BEFORE[:-1])


def test_unused_imports_go() -> None:
    """But not those of functions' own domains, of nodes in branches, or ONNX's."""
    text = """<ir_version: 11, opset_import: ["": 23, "local": 1, "gone": 3, "theirs": 2]>
    g (bool c, float[4] x) => (float[4] y) {
        a = If (c) <then_branch = t () => (p) { p = theirs.Op(x) }, else_branch = e () => (q) { q = Neg(x) }>
        y = local.f(a)
    }
    <domain: "local", opset_import: ["": 23, "gone": 4]> f (a) => (b) { b = Neg(a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert unused.imports.apply(model) == 2
    assert set(model.opset_imports) == {"", "local", "theirs"}
    assert unused.imports.apply(model) == 0


def test_a_long_chain_is_quick_and_goes_whole() -> None:
    """Ten thousand nodes."""
    body = " ".join(f"v{i + 1} = Identity(v{i})" for i in range(10_000))
    model = parse(f"g (float[B,4] x) => (float[B,4] y) {{ v0 = Neg(x) {body} y = Neg(v10000) }}")
    assert identities.apply(model) == 10_000
    assert ops(model) == Counter({"Neg": 2})


def test_names_of_passes_are_unique_within_a_run() -> None:
    """A report lists them by name."""
    for steps in ((*PREPARE, *FUSE), AFTER):
        names = [step.name for step in steps]
        assert len(names) == len(set(names))
