"""`mmdit-optimize` fuses and lowers graphs of any origin, leaves weights alone, and writes all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdit_deploy.cli.optimize import main
from mmdit_deploy.graph import optimize
from mmdit_deploy.graph.passes import Pass

HEADS, HEAD_DIM = 2, 8
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
@pytest.mark.parametrize(("dialect", "op"), [("standard", "Attention"), ("ort", "MultiHeadAttention")])
def test_the_same_is_computed_in_the_dialect(
    dialect: str, op: str, as_function: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(attention_model(as_function=as_function), source)
    assert main([str(source), str(target), "--dialect", dialect, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["before"]["Attention"] == data["after"][op] == 1
    assert {"name": "attention layout", "count": 1} in data["passes"]
    np.testing.assert_allclose(outputs(target), outputs(source), rtol=1e-5, atol=1e-5)
    nodes = onnx.load(target).functions[0].node if as_function else onnx.load(target).graph.node
    assert [node.op_type for node in nodes].count(op) == 1
    assert "Transpose" not in {node.op_type for node in nodes}


def test_text_says_what_fired(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out.onnx"), "--dialect", "ort"]) == 0
    out = capsys.readouterr().out
    assert "attention layout" in out and "MultiHeadAttention" in out


def test_a_second_run_changes_nothing(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    optimize.optimize_file(source, first, "ort")
    again = optimize.optimize_file(first, second, "ort")
    assert all(step.count == 0 for step in again.passes) and again.before == again.after
    assert first.read_bytes() == second.read_bytes()


def test_weights_beside_the_model_are_not_opened(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save_model(attention_model(external=True), source)
    # There is no weights.bin: whoever opens it fails.
    done = optimize.optimize_file(source, tmp_path / "out.onnx", "ort")
    assert done.after["MultiHeadAttention"] == 1
    (weights,) = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer
    assert {e.key: e.value for e in weights.external_data}["location"] == "weights.bin"


def test_references_to_weights_hold_beside_the_input_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, elsewhere = tmp_path / "in.onnx", tmp_path / "elsewhere"
    onnx.save_model(attention_model(external=True), source)
    elsewhere.mkdir()
    assert main([str(source), str(elsewhere / "out.onnx")]) == 2
    assert str(tmp_path / "out.onnx") in capsys.readouterr().err and not list(elsewhere.iterdir())
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"precious")
    assert main([str(source), str(weights), "--force"]) == 2
    assert weights.read_bytes() == b"precious"


def test_references_out_of_the_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = attention_model(external=True)
    model.graph.initializer[0].external_data[0].value = "../weights.bin"
    source = tmp_path / "in.onnx"
    source.write_bytes(model.SerializeToString())
    assert main([str(source), str(tmp_path / "out.onnx")]) == 2
    assert "'../weights.bin'" in capsys.readouterr().err


def test_what_exists_is_replaced_with_force_only(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    for target in (source, link, tmp_path / "." / "in.onnx"):
        assert main([str(source), str(target)]) == 2
    assert source.read_bytes() == before
    assert main([str(source), str(source), "--force"]) == 0
    assert source.read_bytes() != before


def test_before_opset_23_nothing_fires_and_nothing_fails(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "in.onnx")
    done = optimize.optimize_file(tmp_path / "in.onnx", tmp_path / "out.onnx", "ort")
    assert not any(step.count for step in done.passes)
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


@pytest.mark.parametrize("content", [b"", b"not ONNX at all", b"\x08\x0b", None])
def test_files_that_are_no_model(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.onnx"
    if content is not None:
        source.write_bytes(content)
    assert main([str(source), str(tmp_path / "out.onnx")]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "received:" in err and "fix:" in err
    assert not (tmp_path / "out.onnx").exists()


def test_truncated_anywhere(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    cut = tmp_path / "cut.onnx"
    # Not the last bytes: after the opsets there is nothing more that a reader could miss.
    for size in range(0, len(content) - 16, 7):
        cut.write_bytes(content[:size])
        assert main([str(cut), str(tmp_path / "out.onnx")]) == 2, size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.onnx", "in.onnx"]


def test_a_pass_that_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise ValueError("no such luck")

    monkeypatch.setattr(optimize, "FUSE", (Pass("unlucky", fail),))
    assert main([str(source), str(tmp_path / "out.onnx")]) == 3
    assert "unlucky" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_a_folder_that_is_not_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "none" / "out.onnx")]) == 2
    assert "mkdir" in capsys.readouterr().err


def test_functions_that_call_each_other_in_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = attention_model(as_function=True)
    model.functions[0].opset_import.add(domain="mine", version=1)
    model.functions[0].node.append(helper.make_node("Block", ["x", "w"], ["again"], domain="mine"))
    source = tmp_path / "in.onnx"
    source.write_bytes(model.SerializeToString())
    assert main([str(source), str(tmp_path / "out.onnx")]) == 2
    assert "circle" in capsys.readouterr().err
