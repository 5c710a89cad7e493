"""Spellings: small graphs as exporters write them, and what fusing must make of each."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.graph.calls import executed_ops
from mmdit_deploy.graph.fuse import PREPARE
from mmdit_deploy.graph.named_functions import define
from mmdit_deploy.graph.passes import Pass, PassResult, run

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"


@dataclass(frozen=True)
class Spelling:
    """One fixture.

    Args:
        path: of the file.
        expect: nodes by op that the fused graph has.
    """

    path: Path
    expect: Mapping[str, int]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``spelling`` runs on every fixture of its module's ``SUBJECT``."""
    if "spelling" in metafunc.fixturenames:
        folder = FIXTURES / metafunc.module.SUBJECT
        files = json.loads((folder / "index.json").read_text())["files"]
        cases = [
            pytest.param(Spelling(folder / f, about["expect"]), id=f.removesuffix(".onnx"))
            for f, about in files.items()
        ]
        metafunc.parametrize("spelling", cases)


def execute(model: onnx.ModelProto, seed: int = 0) -> list[np.ndarray]:
    """All outputs in ONNX Runtime on CPU, as written, for inputs made from a seed; symbolic axes have unlike sizes."""
    return _session(model).run(None, sample_inputs(model, seed))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def evaluate(model: onnx.ModelProto, seed: int = 0) -> list[np.ndarray]:
    """All outputs in ONNX's reference evaluator, for what ONNX Runtime refuses."""
    outputs = ReferenceEvaluator(model).run(None, sample_inputs(model, seed))
    assert isinstance(outputs, list)
    return outputs


def sample_inputs(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs made from a seed."""
    generator = np.random.default_rng(seed)
    defaults = {tensor.name for tensor in model.graph.initializer}
    types = {i.name: i.type.tensor_type for i in model.graph.input if i.name not in defaults}
    dims = {name: [d.dim_param or d.dim_value for d in t.shape.dim] for name, t in types.items()}
    names = sorted({d for shape in dims.values() for d in shape if isinstance(d, str)})
    sizes = {name: 2 if name == "batch" else 5 + 2 * n for n, name in enumerate(names)}
    inputs = {}
    for name, t in types.items():
        values = generator.standard_normal([sizes.get(d, d) for d in dims[name]])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(t.elem_type)
        inputs[name] = (values > 0) if dtype == np.bool_ else values.astype(dtype)
    return inputs


@pytest.fixture(scope="session")
def in_onnx_runtime() -> Callable[[onnx.ModelProto], list[np.ndarray]]:
    """A graph's outputs in ONNX Runtime."""
    return execute


@pytest.fixture(scope="session")
def in_onnx() -> Callable[[onnx.ModelProto], list[np.ndarray]]:
    """A graph's outputs in ONNX's reference evaluator."""
    return evaluate


def _is_valid(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime opens a graph as its exporter wrote it."""
    try:
        _session(model)
    except Exception:  # of whatever class: it has many
        return False
    return True


@pytest.fixture(scope="session")
def check_spelling() -> Callable[..., None]:
    """Check one spelling against passes: they fire as expected, numbers stay, and a second run changes nothing."""

    def check(
        spelling: Spelling,
        passes: Sequence[Pass],
        *,
        rtol: float = 1e-4,
        atol: float = 1e-5,
        refused: bool = False,  # by ONNX Runtime, as it was: then ONNX's own numbers are the judge
    ) -> None:
        before = onnx.load(spelling.path)
        model = ir.from_proto(before)
        run(model, PREPARE)
        if not _is_valid(before):
            before = ir.to_proto(model)
        results: tuple[PassResult, ...] = run(model, passes, explain=True)
        after = ir.to_proto(model)
        onnx.checker.check_model(after, full_check=True)
        found = Counter(executed_ops(after))
        found.update(node.op_type for node in after.graph.node if node.domain == "mmdit")  # named functions
        wrong = {op: (n, found[op]) for op, n in spelling.expect.items() if found[op] != n}
        left = [f"{r.name}: {x.node}: {x.reason}" for r in results for x in r.left]
        assert not wrong, f"(expected, found): {wrong}; left: {left}"
        if not any(spelling.expect.values()):
            assert not any(r.count for r in results), results
        for mine, theirs in zip(execute(after), (evaluate if refused else execute)(before), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)
        again = run(model, passes)
        assert not any(r.count for r in again), again
        assert ir.to_proto(model).SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)

    return check


@pytest.fixture(scope="session")
def reasons_left() -> Callable[[str, Sequence[Pass]], list[str]]:
    """Check that passes leave a graph, in ONNX's textual form, as it is; gives the reasons."""

    def check(text: str, passes: Sequence[Pass]) -> list[str]:
        proto = onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 23, "mmdit": 1]>\n' + text)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
        define(model)
        before = ir.to_proto(model)
        results = run(model, passes, explain=True)
        assert not any(r.count for r in results), results
        assert list(ir.to_proto(model).graph.node) == list(before.graph.node)
        execute(before)  # the graph was not broken
        return [x.reason for r in results for x in r.left]

    return check


@pytest.fixture(scope="session")
def fused() -> Callable[..., ir.Model]:
    """Fuse a graph in ONNX's textual form, functions and all: numbers stay, and a second run changes nothing."""

    def fuse(text: str, passes: Sequence[Pass], *, rtol: float = 1e-4, atol: float = 1e-5) -> ir.Model:
        header = '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1, "local": 1]>\n'
        before = onnx.parser.parse_model(header + text)
        model = ir.from_proto(before)
        run(model, PREPARE)
        run(model, passes)
        after = ir.to_proto(model)
        onnx.checker.check_model(after, full_check=True)
        for mine, theirs in zip(execute(after), execute(before), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)
        again = run(model, passes)
        assert not any(r.count for r in again), again
        return model

    return fuse


@pytest.fixture(scope="session")
def weights() -> ModuleType:
    """`spellings/without_weights.py`, which is run beside the generators and is no package."""
    spec = importlib.util.spec_from_file_location("without_weights", HERE / "spellings" / "without_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def first_output() -> Callable[[onnx.ModelProto], np.ndarray]:
    """The first output of a whole model of `fixtures/models`, as written, for inputs made from a seed."""
    sizes = json.loads((FIXTURES / "models" / "index.json").read_text())["sizes"]

    def run_whole(model: onnx.ModelProto) -> np.ndarray:
        session = _session(model)
        generator = np.random.default_rng(0)
        feed = {}
        for i in session.get_inputs():
            values = generator.standard_normal([sizes.get(d, d) for d in i.shape])
            kinds = {"tensor(bool)": values > -0.5, "tensor(int64)": (4 * np.abs(values)).astype(np.int64)}
            feed[i.name] = kinds.get(i.type, values.astype(np.float32))
        return np.asarray(session.run(None, feed)[0])

    return run_whole
