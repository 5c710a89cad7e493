"""`mmdit-optimize` and files that are broken or made to do harm: status 2, the reason, and nothing written."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdit_deploy.cli.optimize import main

pytestmark = pytest.mark.usefixtures("in_process")
NBYTES = 4 * 6 * 4  # of w
Change = Callable[[onnx.ModelProto], object]


def model() -> onnx.ModelProto:
    """y = relu(x · w) as a call of a function, with a constant and a branch."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size]) for n, size in (("x", 4), ("y", 6)))
    weights = numpy_helper.from_array(np.arange(24, dtype=np.float32).reshape(4, 6), "w")
    yes = numpy_helper.from_array(np.array(True), "yes")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Block", ["p"], ["h"], name="call", domain="mine"),
        helper.make_node("If", ["yes"], ["i"], name="if", then_branch=leaf("a"), else_branch=leaf("b")),
        helper.make_node("Constant", [], ["c"], name="constant", value=numpy_helper.from_array(np.ones(6, np.float32))),
        helper.make_node("Add", ["i", "c"], ["y"], name="sum"),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    body = helper.make_function("mine", "Block", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    graph = helper.make_graph(nodes, "main", [x], [y], [weights, yes])
    return helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)


def leaf(name: str) -> onnx.GraphProto:
    """A branch that gives h."""
    given = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 6])
    return helper.make_graph([helper.make_node("Identity", ["h"], [name])], name, [], [given])


def weight(m: onnx.ModelProto) -> onnx.TensorProto:
    return m.graph.initializer[0]


def node(m: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in m.graph.node if n.name == name)


def external(m: onnx.ModelProto, location: str = "w.bin", **entries: object) -> onnx.ModelProto:
    weight(m).ClearField("raw_data")
    weight(m).data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": NBYTES, **entries}.items():
        weight(m).external_data.add(key=key, value=str(value))
    return m


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Checks that a model, or bytes, or what is at IN already, is refused in good order; gives what is said."""

    def check(content: onnx.ModelProto | bytes | None, *words: str) -> str:
        source = tmp_path / "in.onnx"
        if content is not None:
            source.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        before = sorted(tmp_path.iterdir())
        assert main([str(source), str(tmp_path / "out.onnx"), "--dialect", "ort"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err and "received:" in err and "fix:" in err, err
        for word in words:
            assert word in err, f"{word!r} is not in:\n{err}"
        assert sorted(tmp_path.iterdir()) == before
        return err

    return check


def test_the_model_itself_is_sound(tmp_path: Path) -> None:
    """So that what follows is refused for what was changed."""
    for name, sound in (("inline", model()), ("external", external(model()))):
        (tmp_path / "w.bin").write_bytes(weight(model()).raw_data)
        (tmp_path / f"{name}.onnx").write_bytes(sound.SerializeToString())
        assert main([str(tmp_path / f"{name}.onnx"), str(tmp_path / f"{name}.out.onnx")]) == 0


@pytest.mark.parametrize("content", [b"", b"not ONNX at all", b"\x08\x0b", bytes(64), b"PK\x03\x04" + bytes(64)])
def test_no_onnx(content: bytes, refused: Callable[..., str]) -> None:
    refused(content, "whole ONNX model")


def test_truncated_at_any_byte(refused: Callable[..., str]) -> None:
    m = model()
    m.ClearField("functions")  # what comes after the opsets: without one of them the rest would be whole
    node(m, "call").domain, node(m, "call").op_type = "", "Relu"
    content = m.SerializeToString()
    whole = len(content) - len(m.opset_import[1].SerializeToString()) - 2  # `mine` is not needed any more
    for size in range(whole):
        refused(content[:size])


def test_truncated_in_a_function(refused: Callable[..., str]) -> None:
    m = model()
    content = m.SerializeToString()
    for size in range(len(content) - len(m.functions[0].SerializeToString()) + 1, len(content)):
        refused(content[:size])


def field(number: int, content: bytes) -> bytes:
    """A message within a message, as protobuf writes it."""
    size, varint = len(content), b""
    while size > 127:
        size, varint = size >> 7, varint + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + varint + bytes([size]) + content


def test_branches_50_deep(refused: Callable[..., str]) -> None:
    graph = b""
    for _ in range(50):
        graph = field(1, field(5, field(6, graph)))  # a node with an attribute that is a graph
    refused(model().SerializeToString() + field(7, graph), "nested too deep")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: None,
    "dangling link": lambda path: path.symlink_to("none"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    KINDS[kind](Path("in.onnx"))
    refused(None)


def with_opsets(*opsets: tuple[str, int], function: bool = False) -> Change:
    def change(m: onnx.ModelProto) -> None:
        target: Any = m.functions[0] if function else m
        del target.opset_import[:]
        target.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets)

    return change


def ir_version(version: int) -> Change:
    return lambda m: setattr(m, "ir_version", version)


HEADERS: dict[str, tuple[Change, str]] = {
    "no opset": (with_opsets(), "opset import"),
    "opset of others only": (with_opsets(("mine", 1)), "opset"),
    "opset 0": (with_opsets(("", 0), ("mine", 1)), "'ai.onnx' in 0"),
    "opset -1": (with_opsets(("", -1), ("mine", 1)), "'ai.onnx' in -1"),
    "opset 10^6": (with_opsets(("", 10**6), ("mine", 1)), "'ai.onnx' in 1000000"),
    "two opsets": (with_opsets(("", 18), ("mine", 1), ("", 21)), "in 18 and in 21"),
    "two names of one opset": (with_opsets(("", 21), ("mine", 1), ("ai.onnx", 18)), "in 21 and in 18"),
    "two of another domain": (with_opsets(("", 21), ("mine", 1), ("mine", 2)), "'mine' in 1 and in 2"),
    "another domain, negative": (with_opsets(("", 21), ("mine", -3)), "'mine' in -3"),
    "opset of a function": (with_opsets(("", 999), function=True), "the function 'Block'"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "IR version"),
    "IR version 0": (ir_version(0), "IR version"),
    "IR version -1": (ir_version(-1), "IR version"),
    "IR version 10^9": (ir_version(10**9), "1000000000"),
    "no graph": (lambda m: m.ClearField("graph"), "graph"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "outputs"),
    "training": (lambda m: m.training_info.add(), "training"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, refused: Callable[..., str]) -> None:
    change, words = HEADERS[case]
    m = model()
    change(m)
    refused(m, words)


def rewire(name: str, **changes: str) -> Change:
    def change(m: onnx.ModelProto) -> None:
        for where, value in changes.items():
            getattr(node(m, name), where)[0] = value

    return change


def swap(m: onnx.ModelProto) -> None:
    nodes = list(m.graph.node)
    del m.graph.node[:]
    m.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])


def circle_through_a_branch(m: onnx.ModelProto) -> None:
    rewire("call", input="i")(m)


def self_call(m: onnx.ModelProto) -> None:
    m.functions[0].node.append(helper.make_node("Block", ["b"], ["again"], domain="mine"))


def circle_of_functions(m: onnx.ModelProto) -> None:
    body = helper.make_node("Other", ["a"], ["c"], domain="mine")
    m.functions[0].node.append(body)
    back = [helper.make_node("Block", ["a"], ["b"], domain="mine")]
    m.functions.append(helper.make_function("mine", "Other", ["a"], ["b"], back, m.opset_import))


def long_circle(m: onnx.ModelProto) -> None:
    """Of 5,000 nodes: it is told in one line, and found without recursion."""
    rewire("product", input="v0")(m)
    m.graph.node.extend(helper.make_node("Relu", [f"v{i}"], [f"v{i - 1}"]) for i in range(1, 5000))
    m.graph.node.append(helper.make_node("Relu", ["p"], ["v4999"]))


def chain(m: onnx.ModelProto, depth: int, calls: int = 1) -> None:
    """Functions that each call the next, once or more often."""
    opsets = m.opset_import
    for i in range(depth):
        values = ["a", *(f"v{j}" for j in range(1, calls)), "b"]
        op = {"op_type": f"F{i + 1}", "domain": "mine"} if i + 1 < depth else {"op_type": "Relu", "domain": ""}
        body = [helper.make_node(inputs=[values[j]], outputs=[values[j + 1]], **op) for j in range(calls)]
        m.functions.append(helper.make_function("mine", f"F{i}", ["a"], ["b"], body, opsets))
    node(m, "call").op_type = "F0"


GRAPHS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "out of order": (swap, ("come after", "'call'", "'product'", "sort")),
    "a circle of two": (rewire("product", input="h"), ("without circles", "'product'", " reads from ", "'call'")),
    "reads itself": (rewire("product", input="p"), ("without circles", "'product'")),
    "a circle through a branch": (circle_through_a_branch, ("without circles", "'if'", "'call'")),
    "a long circle": (long_circle, ("without circles", "more)")),
    "made by nothing": (rewire("product", input="nowhere"), ("'nowhere'", "nothing makes")),
    "an output made by nothing": (lambda m: m.graph.output.add(name="nowhere"), ("'nowhere'", "nothing makes")),
    "made twice": (rewire("call", output="p"), ("made once", "'p'")),
    "an input made": (rewire("product", output="x"), ("made once", "'x'")),
    "an initializer made": (rewire("product", output="w"), ("made once", "'w'")),
    "two inputs of one name": (lambda m: m.graph.input.add().CopyFrom(m.graph.input[0]), ("made once", "'x'")),
    "two initializers of one name": (lambda m: m.graph.initializer.add().CopyFrom(weight(m)), ("made once", "'w'")),
    "an initializer without a name": (lambda m: weight(m).ClearField("name"), ("must have names",)),
    "no op": (lambda m: node(m, "sum").ClearField("op_type"), ("name its op",)),
    "an op that lacks an input": (lambda m: node(m, "sum").input.pop(), ("checker", "Add")),
    "a function that calls itself": (self_call, ("circle", "'Block' calls 'Block'")),
    "functions in a circle": (circle_of_functions, ("circle", " calls ")),
    "a function defined twice": (lambda m: m.functions.append(m.functions[0]), ("defined once", "'Block'")),
    "an output that a function lacks": (lambda m: m.functions[0].output.append("z"), ("'z'", "nothing makes")),
    "3,000 functions deep": (lambda m: chain(m, 3000), ("100 calls", "3000 deep")),
    "2^60 nodes": (lambda m: chain(m, 60, calls=2), ("1,000,000 nodes",)),
    "a constant of nothing": (lambda m: node(m, "constant").ClearField("attribute"), ("one value", "'constant'")),
    "a cast to nothing": (
        lambda m: m.graph.node.append(helper.make_node("Cast", ["x"], ["cast"], to=99)),
        ("element types", "type 99"),
    ),
    "a type that there is not": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99),
        ("element types", "type 99"),
    ),
    "an input of no type": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0),
        ("element types", "'x' is of type 0"),
    ),
    "types 200 deep": (lambda m: nest_types(m, 200), ("nested too deep",)),
}


def nest(m: onnx.ModelProto, depth: int) -> None:
    """Branches in branches in branches."""
    branch = onnx.GraphProto()
    branch.CopyFrom(node(m, "if").attribute[0].g)
    for i in range(depth):
        other = leaf(f"other{i}")
        ifs = [helper.make_node("If", ["yes"], [f"level{i}"], then_branch=branch, else_branch=other)]
        branch = helper.make_graph(ifs, f"level{i}", [], [onnx.ValueInfoProto(name=f"level{i}")])
    node(m, "if").attribute[0].g.CopyFrom(branch)


def nest_types(m: onnx.ModelProto, depth: int) -> None:
    type_ = m.graph.input[0].type
    type_.Clear()
    for _ in range(depth):
        type_ = type_.sequence_type.elem_type
    type_.tensor_type.elem_type = 1


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(case: str, refused: Callable[..., str]) -> None:
    change, words = GRAPHS[case]
    m = model()
    change(m)
    assert len(refused(m, *words)) < 1500


def with_tensor(**fields: object) -> Change:
    def change(m: onnx.ModelProto) -> None:
        for field, value in fields.items():
            if isinstance(value, list):
                getattr(weight(m), field)[:] = value
            else:
                setattr(weight(m), field, value)

    return change


def constant(values: np.ndarray, dtype: int) -> Change:
    def change(m: onnx.ModelProto) -> None:
        node(m, "constant").attribute[0].t.CopyFrom(helper.make_tensor("t", dtype, values.shape, values.astype(float)))

    return change


def raw_constant(dtype: int, raw: bytes) -> Change:
    tensor = onnx.TensorProto(dims=[1], data_type=dtype, raw_data=raw)
    return lambda m: node(m, "constant").attribute[0].t.CopyFrom(tensor)


def float_attribute(name: str, value: object) -> Change:
    def change(m: onnx.ModelProto) -> None:
        attribute = node(m, "constant").attribute
        del attribute[:]
        attribute.append(helper.make_attribute(name, value))

    return change


def sparse(m: onnx.ModelProto) -> None:
    values, indices = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    m.graph.sparse_initializer.add().CopyFrom(helper.make_sparse_tensor(values, indices, [4]))


NAN = np.array([1.0, np.nan])
TENSORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "raw data too short": (with_tensor(raw_data=bytes(NBYTES - 1)), ("'w'", "FLOAT [4, 6]", "95 in raw_data")),
    "raw data too long": (with_tensor(raw_data=bytes(NBYTES + 1)), ("97 in raw_data",)),
    "no data": (lambda m: weight(m).ClearField("raw_data"), ("'w'", "nothing")),
    "data in two places": (with_tensor(float_data=[0.0] * 24), ("raw_data", "24 in float_data")),
    "data of another type": (with_tensor(data_type=TensorProto.INT64), ("INT64",)),
    "negative dims": (with_tensor(dims=[-4, 6]), ("[-4, 6]",)),
    "absurd dims": (with_tensor(dims=[2**31, 2**31, 4]), ("shape",)),
    "dims of the size 2^64": (with_tensor(dims=[2**32, 2**32], raw_data=b""), ("shape",)),
    "10^5 dims": (with_tensor(dims=[2**62] * 10**5), ("shape", "…")),
    "no type": (with_tensor(data_type=0), ("element types", "type 0")),
    "an unknown type": (with_tensor(data_type=99), ("element types", "type 99")),
    "strings as raw data": (with_tensor(data_type=TensorProto.STRING), ("STRING",)),
    "NaN in an initializer": (with_tensor(raw_data=np.full(24, np.nan, np.float32).tobytes()), ("NaN", "'w'")),
    "NaN in a constant": (constant(NAN, TensorProto.FLOAT), ("NaN", "'constant'")),
    "NaN in a double": (constant(NAN, TensorProto.DOUBLE), ("NaN", "'constant'")),
    "NaN in fp16": (constant(NAN, TensorProto.FLOAT16), ("NaN", "'constant'")),
    "NaN in bf16": (constant(NAN, TensorProto.BFLOAT16), ("NaN", "'constant'")),
    "NaN in raw bf16": (raw_constant(TensorProto.BFLOAT16, b"\xc0\xff"), ("NaN",)),
    "NaN in raw FP8": (raw_constant(TensorProto.FLOAT8E4M3FN, b"\xff"), ("NaN",)),
    "NaN in raw FP8 with infinities": (raw_constant(TensorProto.FLOAT8E5M2, b"\x7d"), ("NaN",)),
    "a NaN": (float_attribute("value_float", float("nan")), ("NaN", "'value_float'")),
    "a NaN of several": (float_attribute("value_floats", [1.0, float("nan")]), ("NaN", "'value_floats'")),
    "a sparse initializer": (sparse, ("sparse", "'s'")),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, refused: Callable[..., str]) -> None:
    change, words = TENSORS[case]
    m = model()
    change(m)
    assert len(refused(m, *words)) < 1500


SOUND = {
    "infinities in a mask": constant(np.array([0.0, -np.inf]), TensorProto.FLOAT16),
    "an infinity in FP8": raw_constant(TensorProto.FLOAT8E5M2, b"\x7c"),
    "strings": lambda m: m.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"b"])),
    "int4 in raw data": lambda m: m.graph.initializer.append(
        onnx.TensorProto(name="extra", dims=[3], data_type=TensorProto.INT4, raw_data=b"12")
    ),
    "int4 in a field": lambda m: m.graph.initializer.append(
        helper.make_tensor("extra", TensorProto.INT4, [3], [1, 2, 3])
    ),
    "complex": lambda m: m.graph.initializer.append(helper.make_tensor("z", TensorProto.COMPLEX64, [1], [1 + 2j])),
    "an empty tensor": lambda m: m.graph.initializer.append(
        onnx.TensorProto(name="e", dims=[0, 2**60], data_type=TensorProto.FLOAT)
    ),
    "5 branches deep": lambda m: nest(m, 5),
    "90 functions deep": lambda m: chain(m, 90),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_odd_and_sound(case: str, tmp_path: Path) -> None:
    m = model()
    SOUND[case](m)
    (tmp_path / "in.onnx").write_bytes(m.SerializeToString())
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0


@pytest.mark.parametrize(
    "location",
    ["", ".", "..", "../w.bin", "a/../../w.bin", "/etc/passwd", "C:\\w.bin", "C:/w.bin", "C:w.bin", "..\\w.bin",
     "\\\\host\\w.bin", "//host/w.bin", "w.bin\0", "none.bin", "folder", "pipe", "link.bin", "hard.bin",
     "linked/w.bin", "in.onnx/w.bin", "w" * 5000],
)  # fmt: skip
def test_weights_that_are_not_there_or_elsewhere(location: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}.outside"
    outside.mkdir()
    (outside / "w.bin").write_bytes(bytes(NBYTES))
    (tmp_path / "other.bin").write_bytes(bytes(NBYTES))
    (tmp_path / "link.bin").symlink_to("other.bin")
    (tmp_path / "linked").symlink_to(outside)
    os.link(outside / "w.bin", tmp_path / "hard.bin")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    said = refused(external(model(), location), "external weights")
    assert "'w'" in said and len(said) < 1500
    for word in {"link.bin": "symbolic link", "linked/w.bin": "symbolic link", "hard.bin": "hard link"}.get(
        location, "fix"
    ).split(","):
        assert word in said


SPANS: dict[str, tuple[dict[str, object], str]] = {
    "negative offset": ({"offset": -4}, "'-4'"),
    "negative length": ({"length": -4}, "'-4'"),
    "offset in letters": ({"offset": "zero"}, "'zero'"),
    "offset in hexadecimal": ({"offset": "0x10"}, "'0x10'"),
    "offset in other digits": ({"offset": "٣"}, "offset"),  # Arabic-Indic, which int() reads
    "offset of 5,000 digits": ({"offset": "1" * 5000}, "offset"),
    "offset of nothing": ({"offset": ""}, "offset"),
    "offset with a sign": ({"offset": "+0"}, "'+0'"),
    "past the end": ({"offset": NBYTES}, "within their file"),
    "far past the end": ({"offset": 10**15}, "within their file"),
    "over the end": ({"offset": 1}, "within their file"),
    "2^63": ({"offset": 2**63}, "2^63"),
    "a length of 10^15": ({"length": 10**15}, "takes 96 bytes"),
    "a length too short": ({"length": NBYTES - 4}, "takes 96 bytes"),
}


@pytest.mark.parametrize("case", SPANS)
def test_spans_of_weights(case: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(NBYTES))
    entries, word = SPANS[case]
    assert len(refused(external(model(), **entries), "external weights", word)) < 1500


def test_weights_in_too_short_a_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(NBYTES - 1))
    refused(external(model()), "96 of 'w.bin'", "95 bytes")
    m = external(model())
    del weight(m).external_data[2]  # the length
    refused(m, "96 of 'w.bin'", "95 bytes")


def test_weights_in_two_places(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(NBYTES))
    m = external(model())
    weight(m).raw_data = bytes(NBYTES)
    refused(m, "external")
    m = external(model())
    weight(m).external_data.add(key="location", value="other.bin")
    refused(m, "once")
    m = external(model())
    weight(m).data_type = TensorProto.STRING
    refused(m, "strings")


def test_constants_of_functions_and_branches_are_weights_too(tmp_path: Path, refused: Callable[..., str]) -> None:
    for where in ("function", "branch"):
        m = external(model(), "../w.bin")
        stolen = onnx.TensorProto()
        stolen.CopyFrom(weight(m))
        body = m.functions[0] if where == "function" else node(m, "if").attribute[0].g
        body.node.append(helper.make_node("Constant", [], ["stolen"], value=stolen))
        weight(m).CopyFrom(weight(model()))
        refused(m, "'../w.bin'", "'stolen'")


def test_text_that_is_none(refused: Callable[..., str]) -> None:
    content = model().SerializeToString()
    for name in (b"product", b"main", b"Block"):
        refused(content.replace(name, b"\xff" + name[1:]), "UTF-8")


def test_spans_may_overlap_and_lie_in_a_larger_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(2 * NBYTES))
    m = external(model(), offset=8)
    m.graph.initializer.add().CopyFrom(weight(m))
    m.graph.initializer[-1].name, m.graph.initializer[-1].external_data[1].value = "q", "16"
    (tmp_path / "in.onnx").write_bytes(m.SerializeToString())
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]) == 0
