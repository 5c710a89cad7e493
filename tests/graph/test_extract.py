"""One call cut out of a graph computes what that submodule of the eager model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import MMDiT, calls, grid_ids
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.metrics import compare

SIZES = {"batch": 2, "img_tokens": 15, "txt_tokens": 4}


@pytest.mark.parametrize("graph", ["model.onnx", "model.ort.onnx"])
def test_each_call_computes_its_submodule(
    tiny_spec: ModelSpec,
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    eager_model: Callable[..., MMDiT],
    tmp_path: Path,
    graph: str,
) -> None:
    folder = save_graphs(tmp_path, tiny_spec, RandomWeights(2), graphs_of(tiny_spec))
    whole = onnx.load(folder / graph, load_external_data=False)
    before = whole.SerializeToString(deterministic=True)
    model = eager_model(tiny_spec, RandomWeights(2))
    for call in calls(tiny_spec):
        part = extract_call(whole, call.path)
        assert len(part.graph.node) == 1 and len(part.functions) == 1
        assert [i.name for i in part.graph.input] == list(call.inputs)
        session = open_session(part.SerializeToString(), "ort-cpu", weights_folder=folder)
        values = [
            grid_ids(3, 5) if t.name == "img_ids" else random_tensor(1, t.name, t.shape(SIZES), std=1.0)
            for t in call.kind.inputs
        ]
        with torch.inference_mode():
            expected = model.get_submodule(call.path)(*values)
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = [(n, torch.float32, tuple(t.shape)) for n, t in zip(call.outputs, expected, strict=True)]
        received = run_session(session, dict(zip(call.inputs, values, strict=True)), outputs)
        for name, reference in zip(call.outputs, expected, strict=True):
            assert compare(received[name], reference).rel_l2 <= 1e-5, (call.path, name)
    assert whole.SerializeToString(deterministic=True) == before


def test_casts_of_weights_come_along(
    tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs], save_graphs: Callable[..., Path], tmp_path: Path
) -> None:
    """In the emulated dialect a call reads its weights through casts; the part has them, and no others."""
    dialect = "ort-emulated-bf16"
    folder = save_graphs(
        tmp_path, tiny_spec, RandomWeights(2), graphs_of(tiny_spec, "bf16", (dialect,)), "bf16"
    )
    part = extract_call(onnx.load(folder / f"model.{dialect}.onnx", load_external_data=False), "blocks.1")
    assert {n.op_type for n in part.graph.node} == {"MMDiTLastJointBlock", "Cast"}
    weights = {i.name for i in part.graph.initializer}
    assert weights and all(name.startswith("blocks.1.") for name in weights)
    open_session(part.SerializeToString(), "ort-cpu", weights_folder=folder)


def test_an_unknown_call_is_an_error(tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs]) -> None:
    with pytest.raises(GraphError, match=r"blocks\.2"):
        extract_call(graphs_of(tiny_spec).standard, "blocks.2")
