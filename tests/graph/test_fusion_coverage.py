"""Whole models of diffusers, as others' exporters write them: each attention, norm and RoPE of PyTorch's is one op.

The fixtures hold no weights (`spellings/without_weights.py`), and the index holds what PyTorch calls in each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mmdit_deploy.graph.calls import executed_ops
from mmdit_deploy.graph.fuse import FUSE, PREPARE
from mmdit_deploy.graph.passes import run

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures" / "models"
MAX_REL_L2 = 1e-5  # the tolerance of fp32
INDEX = json.loads((FIXTURES / "index.json").read_text())


@pytest.mark.parametrize("file", INDEX["files"])
def test_what_pytorch_calls_is_fused(
    file: str, weights: ModuleType, first_output: Callable[[onnx.ModelProto], np.ndarray]
) -> None:
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

    expected, received = (first_output(weights.fill(m)) for m in (before, after))
    assert np.isfinite(expected).all() and expected.std() > 0.1
    assert np.linalg.norm(received - expected) <= MAX_REL_L2 * np.linalg.norm(expected)
