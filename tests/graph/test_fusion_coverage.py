"""Whole models of diffusers, as others' exporters write them: each attention, norm and RoPE of PyTorch's is one op.

The fixtures hold no weights (`spellings/without_weights.py`), and the index holds what PyTorch calls in each.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mmdit_deploy.graph.fuse import FUSE, PREPARE
from mmdit_deploy.graph.onnx_file import executed_ops
from mmdit_deploy.graph.passes import run

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures" / "models"
MAX_REL_L2 = 1e-5  # the tolerance of fp32
INDEX = json.loads((FIXTURES / "index.json").read_text())


@pytest.fixture(scope="module")
def weights() -> ModuleType:
    """`spellings/without_weights.py`, which is run beside the generators and is no package."""
    spec = importlib.util.spec_from_file_location("without_weights", HERE / "spellings" / "without_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def execute(model: onnx.ModelProto) -> np.ndarray:
    """The first output in ONNX Runtime on CPU, as written, for inputs made from a seed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    inputs = {}
    for i in session.get_inputs():
        values = generator.standard_normal([INDEX["sizes"].get(d, d) for d in i.shape])
        kinds = {"tensor(bool)": values > -0.5, "tensor(int64)": (4 * np.abs(values)).astype(np.int64)}
        inputs[i.name] = kinds.get(i.type, values.astype(np.float32))
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize("file", INDEX["files"])
def test_what_pytorch_calls_is_fused(file: str, weights: ModuleType) -> None:
    calls = INDEX["files"][file]["calls"]
    before = weights.read(FIXTURES / file)
    model = ir.from_proto(before)
    run(model, PREPARE)
    results = run(model, FUSE, explain=True)
    after = ir.to_proto(model)

    found = executed_ops(after)
    left = [f"{r.name}: {x.node}: {x.reason}" for r in results for x in r.left]
    assert {op: found.get(op, 0) for op in calls} == calls, left
    assert found.get("Softmax", 0) == 0 and not left, left

    again = run(model, FUSE)
    assert not any(r.count for r in again), again
    assert ir.to_proto(model).SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)

    expected, received = (execute(weights.fill(m)) for m in (before, after))
    assert np.isfinite(expected).all() and expected.std() > 0.1
    assert np.linalg.norm(received - expected) <= MAX_REL_L2 * np.linalg.norm(expected)
