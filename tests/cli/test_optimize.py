"""`mmdit-optimize` fuses and lowers graphs of any origin, leaves weights alone, and writes all or nothing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdit_deploy.cli.optimize import main
from mmdit_deploy.cli.optimize_text import text_of
from mmdit_deploy.errors import GraphError, UsageError
from mmdit_deploy.graph import dialects, optimize, surgery
from mmdit_deploy.graph.dialects import USER_DIALECTS, Companion, Dialect
from mmdit_deploy.graph.lower import DIALECTS
from mmdit_deploy.graph.optimize import LeftNode, Optimized, PassDone, Written
from mmdit_deploy.graph.passes import Pass

pytestmark = pytest.mark.usefixtures("in_process")  # but for those that say otherwise
HEADS, HEAD_DIM = 2, 8
MHA = "com.microsoft.MultiHeadAttention"
WIDTH = HEADS * HEAD_DIM


def attention_model(*, as_function: bool = False, external: bool = False, opset: int = 23) -> onnx.ModelProto:
    """Self-attention as exporters write it, x [batch, tokens, 16] → y: split heads, transpose, attend, undo it."""
    shapes = {"heads": [0, 0, HEADS, HEAD_DIM], "merged": [0, 0, WIDTH]}
    constants = [
        helper.make_node("Constant", [], [f"shape_{name}"], value=numpy_helper.from_array(np.array(dims), name))
        for name, dims in shapes.items()
    ]
    nodes = [
        *constants,
        helper.make_node("MatMul", ["x", "w"], ["projected"]),
        helper.make_node("Reshape", ["projected", "shape_heads"], ["split"]),
        helper.make_node("Transpose", ["split"], ["heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Attention", ["heads", "heads", "heads"], ["attended"]),
        helper.make_node("Transpose", ["attended"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "shape_merged"], ["y"]),
    ]
    known = [
        helper.make_tensor_value_info("projected", TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
        helper.make_tensor_value_info("split", TensorProto.FLOAT, ["batch", "tokens", HEADS, HEAD_DIM]),
        helper.make_tensor_value_info("attended", TensorProto.FLOAT, ["batch", HEADS, "tokens", HEAD_DIM]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "tokens", WIDTH]) for n in ("x", "y"))
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    initializer = numpy_helper.from_array(weights, "w")
    if external:
        initializer.ClearField("raw_data")
        initializer.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(weights.nbytes))):
            initializer.external_data.add(key=key, value=value)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    functions = []
    if as_function:
        body = helper.make_function("mine", "Block", ["x", "w"], ["y"], nodes, opsets[:1], value_info=known)
        functions, nodes, known = [body], [helper.make_node("Block", ["x", "w"], ["y"], domain="mine")], []
    graph = helper.make_graph(nodes, "attention", [x], [y], [initializer], value_info=known[:-1])
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(attention_model(), path)
    return path


def outputs(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    return y


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize(("dialect", "op"), [("standard", "Attention"), ("ort", MHA)])
def test_the_same_is_computed_in_the_dialect(
    dialect: str, op: str, as_function: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(attention_model(as_function=as_function), source)
    assert main([str(source), str(target), "--dialect", dialect, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["before"]["Attention"] == data["after"][op] == 1
    assert {"name": "attention layout", "found": 1, "fused": 1, "left": []} in data["passes"]
    np.testing.assert_allclose(outputs(target), outputs(source), rtol=1e-5, atol=1e-5)
    nodes = onnx.load(target).functions[0].node if as_function else onnx.load(target).graph.node
    assert [node.op_type for node in nodes].count(op.split(".")[-1]) == 1
    assert "Transpose" not in {node.op_type for node in nodes}


def test_text_says_what_fired(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out.onnx"), "--dialect", "ort"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["found", "fused", "left"] in lines and ["attention", "layout", "1", "1", "0"] in lines
    assert ["Attention", "1", "0"] in lines and [MHA, "0", "1"] in lines
    assert not [line for line in lines if "RotaryEmbedding" in line or "SiLU" in line]  # there is none


def test_what_was_left_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = attention_model(as_function=True)
    (attention,) = [node for node in model.functions[0].node if node.op_type == "Attention"]
    attention.attribute.append(helper.make_attribute("is_causal", 1))
    onnx.save(model, tmp_path / "in.onnx")
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--explain"]) == 0
    out = capsys.readouterr().out
    assert "nothing was fused" in out and "a copy" in out
    assert "left by 'attention layout': 1 of 1" in out
    assert "causal" in out and "Reshape → y in Block (attended)" in out
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--json", "--force"]) == 0
    out, err = capsys.readouterr()
    (step,) = [p for p in json.loads(out)["passes"] if p["found"]]
    assert step["left"][0]["scope"] == "Block" and "attended" in step["left"][0]["reason"]
    assert "--explain" in err


def test_many_nodes_of_one_reason_are_one_group() -> None:
    left = tuple(LeftNode(f"node_{i}", "Block" if i else "", f"the rank is not known (v{i})") for i in range(1000))
    step = PassDone("attention", 1001, 1, (*left, LeftNode("other\x1b[2J", "", "not merged to (B, N, H·D)")))
    file = Written("out.onnx", "ort", True, (), {"Gelu": 1})
    text = text_of(Optimized("in.onnx", "ort", (), (step,), {"Gelu": 0}, {"Gelu": 1}, (file,)), explain=True)
    assert text.count("the rank is not known") == 1 and "the rank is not known: 1000" in text
    assert "node_0 (v0)" in text and "node_1 in Block (v1)" in text and "and 980 more" in text
    assert "not merged to" in text and "\x1b" not in text and len(text.splitlines()) < 50


def test_where_nothing_is_found_the_file_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), source)
    for dialect in USER_DIALECTS:
        assert main([str(source), str(target), "--dialect", dialect, "--force"]) == 0
        out = capsys.readouterr().out
        assert "nothing to fuse was found" in out and "unchanged" in out
        assert target.read_bytes() == source.read_bytes()


def test_dialects_are_named_in_one_table() -> None:
    assert set(USER_DIALECTS) - {"standard"} == {name for name in DIALECTS if "emulated" not in name} - {
        d.companion.dialect for d in USER_DIALECTS.values() if d.companion
    }


@pytest.fixture
def two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialect that comes with a second file."""
    both = {**USER_DIALECTS, "two": Dialect("two files", Companion("ort", "bodies"))}
    monkeypatch.setattr(dialects, "USER_DIALECTS", both)
    monkeypatch.setattr(optimize, "USER_DIALECTS", both)
    monkeypatch.setitem(DIALECTS, "two", ())


@pytest.mark.usefixtures("two_files")
def test_a_dialect_with_a_second_file(source: Path, tmp_path: Path) -> None:
    target, second = tmp_path / "out.onnx", tmp_path / "out.bodies.onnx"
    done = optimize.optimize_file(source, target, "two")
    assert [(file.path, file.dialect) for file in done.files] == [(str(target), "two"), (str(second), "ort")]
    assert "Attention" in {node.op_type for node in onnx.load(target).graph.node}
    assert "MultiHeadAttention" in {node.op_type for node in onnx.load(second).graph.node}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.bodies.onnx", "out.onnx"]
    assert str(second) in text_of(done, explain=False)


@pytest.mark.usefixtures("two_files")
def test_both_files_or_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, second = tmp_path / "out.onnx", tmp_path / "out.bodies.onnx"
    second.write_text("mine")
    with pytest.raises(UsageError, match=r"bodies\.onnx, an existing file"):
        optimize.optimize_file(source, target, "two")
    assert not target.exists() and second.read_text() == "mine"

    def fail(_: object) -> int:
        raise ValueError("no such luck")

    monkeypatch.setitem(DIALECTS, "ort", (Pass("unlucky", fail),))
    with pytest.raises(GraphError, match="unlucky"):
        optimize.optimize_file(source, target, "two", force=True)
    assert not target.exists() and second.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.bodies.onnx"]


@pytest.mark.usefixtures("two_files")
def test_the_second_file_is_never_the_model(source: Path, tmp_path: Path) -> None:
    """Nobody named it."""
    model = source.rename(tmp_path / "out.bodies.onnx")
    content = model.read_bytes()
    with pytest.raises(UsageError, match="not over the model"):
        optimize.optimize_file(model, tmp_path / "out.onnx", "two", force=True)
    assert model.read_bytes() == content and not (tmp_path / "out.onnx").exists()


def test_the_default_of_an_input_is_no_constant(tmp_path: Path) -> None:
    """A caller may give another weight of the norm: AdaLN cannot be one op there."""
    text = """<ir_version: 11, opset_import: ["": 23]>
    g (float[B,N,4] x, float[B,1,4] scale, float[B,1,4] shift, float[4] w = {1, 1, 1, 1}) => (float[B,N,4] y)
      <float one = {1}> {
      normed = LayerNormalization(x, w)
      factor = Add(scale, one)
      scaled = Mul(normed, factor)
      y = Add(scaled, shift)
    }"""
    path = tmp_path / "in.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    optimize.optimize_file(path, tmp_path / "out.onnx", "ort")
    nodes = {node.op_type: list(node.input) for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert nodes["LayerNormalization"] == ["x", "w"] and "MMDiTModulate" in nodes


def test_a_second_run_changes_nothing(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    optimize.optimize_file(source, first, "ort")
    again = optimize.optimize_file(first, second, "ort")
    assert all(step.fused == 0 for step in again.passes) and again.before == again.after
    assert first.read_bytes() == second.read_bytes()


def test_weights_beside_the_model_are_not_opened(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(attention_model(external=True).SerializeToString())
    weights = tmp_path / "weights.bin"
    weights.write_bytes(bytes(WIDTH * WIDTH * 4))
    os.utime(weights, ns=(0, 0))  # by which a read shows
    done = optimize.optimize_file(source, tmp_path / "out.onnx", "ort")
    assert done.after[MHA] == 1 and weights.stat().st_atime_ns == 0
    (reference,) = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer
    assert {e.key: e.value for e in reference.external_data}["location"] == "weights.bin"


def test_references_to_weights_hold_beside_the_input_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, elsewhere = tmp_path / "in.onnx", tmp_path / "elsewhere"
    source.write_bytes(attention_model(external=True).SerializeToString())
    weights = tmp_path / "weights.bin"
    weights.write_bytes(bytes(WIDTH * WIDTH * 4))
    elsewhere.mkdir()
    assert main([str(source), str(elsewhere / "out.onnx")]) == 2
    assert str(tmp_path / "out.onnx") in capsys.readouterr().err and not list(elsewhere.iterdir())
    assert main([str(source), str(weights), "--force"]) == 2
    assert weights.read_bytes() == bytes(WIDTH * WIDTH * 4)


def test_what_exists_is_replaced_with_force_only(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    for target in (source, link, tmp_path / "." / "in.onnx"):
        assert main([str(source), str(target)]) == 2
    assert source.read_bytes() == before
    assert main([str(source), str(source), "--force"]) == 0
    assert source.read_bytes() != before


def test_devices_are_not_replaced(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), os.devnull, "--force"]) == 2
    assert "a file" in capsys.readouterr().err and stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_pass_that_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise ValueError("no such luck")

    monkeypatch.setattr(surgery, "FUSE", (Pass("unlucky", fail),))
    assert main([str(source), str(tmp_path / "out.onnx")]) == 3
    assert "unlucky" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_a_folder_that_is_not_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "none" / "out.onnx")]) == 2
    assert "mkdir" in capsys.readouterr().err


@pytest.mark.parametrize("dialect", USER_DIALECTS)
def test_the_graph_of_a_bundle(dialect: str, bundle: Path) -> None:
    """It is fused already, and its weights file passes for what it is: a plain one, with one name."""
    done = optimize.optimize_file(bundle / "model.onnx", bundle / "again.onnx", dialect)
    others = {"ort": MHA, "trt-plugin": "mmdit.plugin.MMDiTAttentionPlugin", "decomposed": "Softmax"}
    attention = others.get(dialect, "Attention")
    assert done.before["Attention"] == done.after[attention] > 0
    assert not any(step.fused for step in done.passes if step not in done.files[0].passes)
    onnx.checker.check_model(str(bundle / "again.onnx"))
