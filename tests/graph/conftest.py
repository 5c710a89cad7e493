"""Spellings: small graphs as exporters write them, and what fusing must make of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mmdit_deploy.graph.fuse import PREPARE
from mmdit_deploy.graph.onnx_file import executed_ops
from mmdit_deploy.graph.passes import Pass, PassResult, run

FIXTURES = Path(__file__).parent / "fixtures"


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
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    names = sorted({d for i in session.get_inputs() for d in i.shape if isinstance(d, str)})
    sizes = {name: 2 if name == "batch" else 5 + 2 * n for n, name in enumerate(names)}
    inputs = {}
    for i in session.get_inputs():
        values = generator.standard_normal([sizes.get(d, d) for d in i.shape])
        dtype = {"tensor(bool)": "bool", "tensor(float16)": "float16", "tensor(int64)": "int64"}.get(i.type, "float32")
        inputs[i.name] = (values > 0) if dtype == "bool" else values.astype(dtype)
    return session.run(None, inputs)


@pytest.fixture(scope="session")
def check_spelling() -> Callable[..., None]:
    """Check one spelling against passes: they fire as expected, numbers stay, and a second run changes nothing."""

    def check(spelling: Spelling, passes: Sequence[Pass], *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        before = onnx.load(spelling.path)
        model = ir.from_proto(before)
        run(model, PREPARE)
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
        for mine, theirs in zip(execute(after), execute(before), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)
        again = run(model, passes)
        assert not any(r.count for r in again), again
        assert ir.to_proto(model).SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)

    return check
