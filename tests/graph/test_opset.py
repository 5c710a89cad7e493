"""Graphs of opset 7 to 22 become opset 23 and compute the same, in functions and branches too; no weight is read."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.fuse.opset import OLDEST, OPSET, opset
from mmdit_deploy.graph.fuse.opset_changes import CHANGES


def model(text: str, version: int, ir_version: int = 8) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {version}, "local": 1]>\n{text}')


def run(proto: onnx.ModelProto) -> list[np.ndarray]:
    """All outputs in ONNX Runtime, as written, for inputs made from a seed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    dtypes = {
        "tensor(float)": "float32",
        "tensor(float16)": "float16",
        "tensor(int64)": "int64",
        "tensor(bool)": "bool",
    }
    inputs = {
        i.name: np.asarray(generator.standard_normal(i.shape) if i.shape else generator.standard_normal()).astype(
            dtypes[i.type]
        )
        for i in session.get_inputs()
    }
    return session.run(None, inputs)


def evaluate(proto: onnx.ModelProto) -> list[np.ndarray]:
    """All outputs in ONNX's reference evaluator, for the same inputs."""
    generator = np.random.default_rng(0)
    inputs = {
        i.name: generator.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in proto.graph.input
    }
    return ReferenceEvaluator(proto).run(None, inputs)


def upgraded(proto: onnx.ModelProto) -> onnx.ModelProto:
    result = ir.from_proto(proto)
    assert opset.apply(result) == 1
    assert opset.apply(result) == 0
    out = ir.to_proto(result)
    onnx.checker.check_model(out, full_check=True)
    assert {i.version for i in out.opset_import if i.domain == ""} == {OPSET}
    assert out.ir_version >= 11
    return out


G = "g (float[2,6,4] x) => (float[2,6,4] y)"
ANY = "g (float[2,6,4] x) => (float[A,B,C] y)"
IMAGE = "g (float[1,2,4,4] x) => (float[N,C,H,W] y)"
# By op: an opset from before each of its changes, and a graph.
OLD = {
    "Clip": (7, f"{G} {{ y = Clip<min = -0.5, max = 0.5>(x) }}"),
    "Clip, one side": (9, f"{G} {{ y = Clip<max = 0.5>(x) }}"),
    "Clip, fp16": (10, "g (float16[8] x) => (float16[8] y) { y = Clip<min = -0.5, max = 0.5>(x) }"),
    "Dropout": (7, f"{G} {{ y = Dropout<ratio = 0.5>(x) }}"),
    "Pad": (8, f"{ANY} {{ y = Pad<pads = [0,1,0,0,0,2], value = 3.0>(x) }}"),
    "Pad, reflect": (10, f"{ANY} {{ y = Pad<mode = \"reflect\", pads = [0,1,0,0,0,2]>(x) }}"),
    "ReduceSum": (12, f"{ANY} {{ y = ReduceSum<axes = [-1]>(x) }}"),
    "ReduceMean": (17, f"{ANY} {{ y = ReduceMean<axes = [-1, 1], keepdims = 1>(x) }}"),
    "ReduceMean, all": (13, "g (float[2,6,4] x) => (float y) { y = ReduceMean<keepdims = 0>(x) }"),
    "ReduceL2": (11, f"{ANY} {{ y = ReduceL2<axes = [2]>(x) }}"),
    "Slice": (9, f"{ANY} {{ y = Slice<axes = [1, 2], starts = [1, 0], ends = [-1, 3]>(x) }}"),
    "Slice, no axes": (7, f"{ANY} {{ y = Slice<starts = [0, 1], ends = [1, 4]>(x) }}"),
    "Softmax, last": (12, f"{G} {{ y = Softmax<axis = 2>(x) }}"),
    "Softmax, last from behind": (11, f"{G} {{ y = Softmax<axis = -1>(x) }}"),
    "Softmax, flat": (8, f"{G} {{ y = Softmax(x) }}"),
    "Softmax, all": (12, f"{G} {{ y = Softmax<axis = 0>(x) }}"),
    "Softmax, in the middle": (9, f"{G} {{ z = Relu(x) s = Softmax<axis = 1>(z) y = Neg(s) }}"),
    "LogSoftmax": (11, f"{G} {{ y = LogSoftmax<axis = 1>(x) }}"),
    "Hardmax": (11, f"{G} {{ y = Hardmax<axis = 1>(x) }}"),
    "Split": (12, "g (float[2,6] x) => (float[2,2] y, float[2,4] z) { y, z = Split<axis = 1, split = [2, 4]>(x) }"),
    "Split, equal": (9, "g (float[2,6] x) => (float[2,3] y, float[2,3] z) { y, z = Split<axis = 1>(x) }"),
    "Split, equal, 13": (17, "g (float[2,6] x) => (float[2,3] y, float[2,3] z) { y, z = Split<axis = 1>(x) }"),
    "Squeeze": (12, "g (float[2,1,4] x) => (float[2,4] y) { y = Squeeze<axes = [1]>(x) }"),
    "Squeeze, all": (11, "g (float[2,1,4] x) => (float[2,4] y) { y = Squeeze(x) }"),
    "Unsqueeze": (12, "g (float[2,4] x) => (float[A,B,C,D] y) { y = Unsqueeze<axes = [0, -1]>(x) }"),
    "TopK": (9, "g (float[2,6] x) => (float[2,3] y, int64[2,3] z) { y, z = TopK<k = 3>(x) }"),
    "Scatter": (
        10,
        "g (float[2,4] x, float[1,2] u) => (float[2,4] y) <int64[1,2] i = {1, 0}> { y = Scatter<axis = 0>(x, i, u) }",
    ),
    "GridSample": (
        19,
        "g (float[1,2,4,4] x, float[1,3,3,2] p) => (float[N,C,H,W] y) { y = GridSample<mode = \"bicubic\">(x, p) }",
    ),
    "DFT": (17, "g (float[1,4,6,1] x) => (float[A,B,C,D] y) { y = DFT(x) }"),
    "GroupNormalization": (
        18,
        "g (float[1,4,3] x, float[2] s, float[2] b) => (float[1,4,3] y)"
        " { y = GroupNormalization<num_groups = 2>(x, s, b) }",
    ),
    "Upsample": (7, f"{IMAGE} {{ y = Upsample<scales = [1.0, 1.0, 2.0, 1.5]>(x) }}"),
    "Upsample, linear": (
        9,
        f"{IMAGE} <float[4] s = {{1.0, 1.0, 2.0, 3.0}}> {{ y = Upsample<mode = \"linear\">(x, s) }}",
    ),
    "Resize": (10, f"{IMAGE} <float[4] s = {{1.0, 1.0, 2.0, 3.0}}> {{ y = Resize<mode = \"nearest\">(x, s) }}"),
    "Resize, sizes": (
        11,
        f"{IMAGE} <float[0] none = {{}}, int64[4] n = {{1, 2, 7, 3}}>"
        " { y = Resize<mode = \"cubic\", cubic_coeff_a = -0.5>(x, none, none, n) }",
    ),
    "RoiAlign": (
        15,
        "g (float[1,2,8,8] x) => (float[N,C,H,W] y) <float[1,4] r = {1.0, 1.5, 5.0, 6.5}, int64[1] i = {0}>"
        " { y = RoiAlign<output_height = 3, output_width = 3, sampling_ratio = 2>(x, r, i) }",
    ),
    "BatchNormalization": (
        8,
        "g (float[2,3,4] x, float[3] s, float[3] b, float[3] m) => (float[2,3,4] y)"
        " { v = Exp(m) y = BatchNormalization<spatial = 1>(x, s, b, m, v) }",
    ),
}  # fmt: skip
NO_KERNEL = ("RoiAlign",)  # of opset 22, in ONNX Runtime


@pytest.mark.parametrize("name", OLD)
def test_the_upgraded_graph_computes_the_same(name: str) -> None:
    version, text = OLD[name]
    before = model(text, version)
    after = upgraded(before)
    execute = evaluate if name in NO_KERNEL else run
    for mine, theirs in zip(execute(after), run(before), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def defaults(schema: onnx.defs.OpSchema) -> dict[str, object]:
    return {
        name: onnx.helper.get_attribute_value(a.default_value) if a.default_value.name else None
        for name, a in schema.attributes.items()
    }


def test_the_table_has_every_change_that_a_schema_shows() -> None:
    """An op that is no more, an attribute that is gone or means something else by default, an input that is needed."""
    history: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= OPSET:
            history.setdefault(schema.name, []).append(schema)
    missing = []
    for op, schemas in history.items():
        schemas.sort(key=lambda s: s.since_version)
        for old, new in itertools.pairwise(schemas):
            known = [since for since, _ in CHANGES.get(op, ())]
            before, after = defaults(old), defaults(new)
            breaks = (
                new.deprecated
                or any(name not in after or after[name] != value for name, value in before.items())
                or len(new.inputs) < len(old.inputs)
                or len(new.outputs) < len(old.outputs)
                or new.min_input > old.min_input
            )
            if new.since_version > OLDEST and breaks and new.since_version not in known:
                missing.append((op, new.since_version))
    assert not missing


FUNCTIONS = """g (float[2,1,4] x) => (float[2,4] y, float[2,1] z) {
    y = local.f <axes = [1]> (x)
    z = local.f <axes = [2]> (x)
}
<domain: "local", opset_import: ["": 12, "local": 1]> f <axes> (x) => (y) {
    s = Relu(x)
    m = ReduceMean<axes: ints = @axes, keepdims = 1>(s)
    y = local.h <axes: ints = @axes> (m)
}
<domain: "local", opset_import: ["": 11]> h <axes> (x) => (y) { y = Squeeze<axes: ints = @axes>(x) }
"""


def test_functions_stay_functions() -> None:
    """Each by its own import, with attributes that the calls give."""
    text = FUNCTIONS.replace("local.f <axes = [2]> (x)", "local.f <axes = [1]> (x)").replace("[2,1] z", "[2,4] z")
    before = model(text, 12)
    after = upgraded(before)
    assert [f.name for f in after.functions] == ["f", "h"]
    assert all(i.version == OPSET for f in after.functions for i in f.opset_import if i.domain == "")
    for mine, theirs in zip(run(after), run(before), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_branches_and_loop_bodies() -> None:
    text = """g (bool c, float[2,1,4] x) => (float[2,4] y, float[3,2,4] z) <int64 n = {3}, bool t = {1}> {
        y = If (c) <
            then_branch = t1 () => (float[2,4] a) { a = Squeeze<axes = [1]>(x) },
            else_branch = e1 () => (float[2,4] b) { s = Softmax<axis = 1>(x) b = Squeeze<axes = [1]>(s) }>
        z = Loop (n, t) <body = l (int64 i, bool go) => (bool on, float[2,4] o) {
            on = Identity(go)
            w = LogSoftmax(x)
            o = Squeeze<axes = [1]>(w)
        }>
    }"""
    before = model(text, 11)
    for mine, theirs in zip(run(upgraded(before)), run(before), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


REFUSED = {
    "opset 6": (6, f"{G} {{ y = Relu(x) }}", "opset 7 to"),
    "Scan with a batch": (
        8,
        "g (float[1,2] s, float[1,3,2] x) => (float[1,2] y) { y = Scan<num_scan_inputs = 1, body = b"
        " (float[2] a, float[2] b) => (float[2] c) { c = Add(a, b) }>(, s, x) }",
        "Scan of opset 8 .*batch",
    ),
    "a mask of floats": (7, f"{G} {{ a, m = Dropout(x) y = Add(a, m) }}", "Dropout of opset 7 .*mask"),
    "a batch norm per element": (
        8,
        "g (float[2,3,4] x, float[3,4] s) => (float[2,3,4] y) { y = BatchNormalization<spatial = 0>(x, s, s, s, s) }",
        "BatchNormalization of opset 8 .*spatial",
    ),
    "shrinking": (10, "g (float[1,2,4,4] x, float[4] s) => (float[A,B,C,D] y) { y = Resize(x, s) }", "may shrink"),
    "an attribute that never was": (17, f"{G} {{ y = Relu<of = 1>(x) }}", "Relu of opset 17 .*of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused(name: str) -> None:
    version, text, message = REFUSED[name]
    graph = ir.from_proto(model(text, version))
    with pytest.raises(UsageError, match=message) as error:
        opset.apply(graph)
    assert error.value.received and error.value.fix


def test_an_opset_that_onnx_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="opset 999"):
        opset.apply(ir.from_proto(model(f"{G} {{ y = Relu(x) }}", 999)))


@pytest.mark.parametrize("version", [OPSET, OPSET + 1])
def test_a_new_opset_stays(version: int) -> None:
    before = ir.from_proto(model(f"{G} {{ y = Relu(x) }}", version, ir_version=12))
    assert opset.apply(before) == 0
    assert before.opset_imports[""] == version


def test_ops_of_other_domains_stay() -> None:
    """Quantized ones, those of other people, and ONNX's machine learning ones."""
    text = """<ir_version: 8, opset_import: ["ai.onnx": 12, "com.microsoft": 1, "ai.onnx.ml": 2, "theirs": 4]>
    g (float[2,4] x) => (float[2,4] y) {
        a = com.microsoft.BiasGelu(x, x)
        b = ai.onnx.ml.Scaler<offset = [0.0], scale = [2.0]>(a)
        c = theirs.Squeeze<axes = [7]>(b)
        y = Softmax<axis = -1>(c)
    }"""
    graph = ir.from_proto(onnx.parser.parse_model(text))
    assert opset.apply(graph) == 1
    assert [node.domain for node in graph.graph] == ["com.microsoft", "ai.onnx.ml", "theirs", ""]
    assert graph.graph.node(2).attributes["axes"].as_ints() == (7,)
    assert dict(graph.opset_imports) == {"com.microsoft": 1, "ai.onnx.ml": 2, "theirs": 4, "": OPSET}


def test_before_ir_4_initializers_are_no_inputs() -> None:
    """They had to be listed there; later that would make each a default that a caller may replace."""
    proto = model("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Mul(x, w) }", 7, 3)
    after = upgraded(proto)
    assert [i.name for i in after.graph.input] == ["x"]
    assert [i.name for i in upgraded(model(OLD["Clip"][1], 7, 4)).graph.input] == ["x"]


BIG = """
import resource, sys
from pathlib import Path
from mmdit_deploy.graph.fuse import CLEAN, FUSE, PREPARE
from mmdit_deploy.graph.passes import run
from mmdit_deploy.graph.onnx_file import read_onnx, to_ir
path = Path(sys.argv[1])
model = to_ir(read_onnx(path), path.parent)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(model, (*PREPARE, *FUSE, *CLEAN))
assert model.opset_imports[""] == 23
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_three_gigabytes_of_weights_are_not_read(tmp_path: Path) -> None:
    """A sparse file stands in for them; nothing is logged either, as onnxscript's converter does."""
    proto = model(
        "g (float[1,3,16384] x) => (float[3,49152] y) {"
        " t = Transpose(v) c = Cast<to = 1>(t) w = Identity(c) m = MatMul(x, w) y = Squeeze<axes = [0]>(m) }",
        12,
    )
    weight = proto.graph.initializer.add(name="v", data_type=onnx.TensorProto.FLOAT, dims=[49152, 16384])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("length", str(16384 * 49152 * 4))):
        weight.external_data.add(key=key, value=value)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(16384 * 49152 * 4)
    onnx.save(proto, tmp_path / "m.onnx")
    done = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path / "m.onnx")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100_000  # kilobytes
    assert not done.stderr
