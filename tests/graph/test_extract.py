"""Calls cut out of a graph: one computes what its submodule does, and segments in turn what the whole graph does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.extract import extract_call, extract_segment
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.graph.named_functions import NAMED_FUNCTIONS
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import MMDiT, calls, grid_ids
from mmdit_deploy.model.partition import call_bytes, partition
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec
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
        assert len(part.graph.node) == 1 and called(part) == {call.kind.function}
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
    folder = save_graphs(tmp_path, tiny_spec, RandomWeights(2), graphs_of(tiny_spec, "bf16", (dialect,)), "bf16")
    part = extract_call(onnx.load(folder / f"model.{dialect}.onnx", load_external_data=False), "blocks.1")
    assert {n.op_type for n in part.graph.node} == {"MMDiTLastJointBlock", "Cast"}
    weights = {i.name for i in part.graph.initializer}
    assert weights and all(name.startswith("blocks.1.") for name in weights)
    open_session(part.SerializeToString(), "ort-cpu", weights_folder=folder)


def test_an_unknown_call_is_an_error(tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs]) -> None:
    with pytest.raises(GraphError, match=r"blocks\.2"):
        extract_call(graphs_of(tiny_spec).standard, "blocks.2")


OUTPUTS = ("blocks.0", "blocks.2")


def called(part: onnx.ModelProto) -> set[str]:
    """The functions of a part that the model calls; there are no others but those that they call in turn."""
    named = {f.name for f in part.functions} & set(NAMED_FUNCTIONS)
    assert named == {n.op_type for f in part.functions for n in f.node} & set(NAMED_FUNCTIONS)
    return {f.name for f in part.functions} - named


def execute(model: onnx.ModelProto, values: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """All outputs by name; of the values it takes those that it reads."""
    session = open_session(model.SerializeToString(), "ort-cpu", weights_folder=folder)
    names = [o.name for o in session.get_outputs()]
    results = session.run(names, {i.name: values[i.name] for i in session.get_inputs()})
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("dialect", [None, "trt"])
def test_segments_one_after_the_other_are_the_whole(
    tiny_spec: ModelSpec,
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    tmp_path: Path,
    segments: int,
    dialect: str | None,
) -> None:
    """As a runtime runs them: each reads the model's inputs and what segments before it wrote, and nothing else."""
    spec = dataclasses.replace(tiny_spec, depth=3)
    graphs = graphs_of(spec, "fp32", ("trt",), OUTPUTS)
    folder = save_graphs(tmp_path, spec, RandomWeights(2), graphs)
    whole = graphs.standard
    before = whole.SerializeToString(deterministic=True)
    contract = Contract.of(spec, PRECISIONS["fp32"])
    inputs = {t.name: random_tensor(1, t.name, t.shape(SIZES), std=1.0).numpy() for t in contract.inputs}
    inputs["img_ids"] = grid_ids(3, 5).numpy()
    expected = execute(whole, inputs, folder)
    assert list(expected) == ["sample", *OUTPUTS]

    live, seen = dict(inputs), Counter[str]()
    chain = calls(spec, OUTPUTS)
    for i, paths in enumerate(partition(chain, call_bytes(spec, PRECISIONS["fp32"]), segments)):
        part = extract_segment(whole, paths, f"part.{i}")
        assert part.graph.name == f"part.{i}" and [n.name for n in part.graph.node] == list(paths)
        assert called(part) == {c.kind.function for c in chain if c.path in paths}
        seen.update(t.name for t in part.graph.initializer)
        if dialect is not None:
            part = ir.to_proto(lower(ir.from_proto(part), dialect)[0])
            assert [n.op_type for n in part.graph.node].count("Gemm") == 1
        made = execute(part, live, folder)
        assert not set(made) & set(live)
        live |= made
    assert whole.SerializeToString(deterministic=True) == before
    assert seen == Counter(t.name for t in whole.graph.initializer)  # each weight in one segment
    for name, reference in expected.items():
        assert compare(torch.from_numpy(live[name]), torch.from_numpy(reference)).rel_l2 <= 1e-6, name


def test_a_segment_gives_what_others_read_and_what_the_graph_returns(
    tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs]
) -> None:
    spec = dataclasses.replace(tiny_spec, depth=3)
    whole = graphs_of(spec, "fp32", ("trt",), OUTPUTS).standard
    chain = [call.path for call in calls(spec, OUTPUTS)]
    cut = chain.index("modulations.1.img")
    first, last = (extract_segment(whole, part, "part") for part in (chain[:cut], chain[cut:]))
    # blocks.0 is read by the next segment and returned: one output, once
    assert {o.name for o in first.graph.output} == {"conditioning", "blocks.0", "blocks.0.txt"}
    assert {i.name for i in last.graph.input} == {"conditioning", "blocks.0", "blocks.0.txt"}
    assert {o.name for o in last.graph.output} == {"sample", "blocks.2"}
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in first.graph.output}
    assert shapes["blocks.0.txt"] == ["batch", "txt_tokens", spec.width]
    assert shapes["conditioning"] == ["batch", spec.cond_dim]
    assert (last.producer_name, last.producer_version) == (whole.producer_name, whole.producer_version)


def test_an_unknown_call_of_a_segment_is_an_error(tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs]) -> None:
    with pytest.raises(GraphError, match=r"each call of part") as caught:
        extract_segment(graphs_of(tiny_spec).standard, ["blocks.1", "blocks.7", "nothing"], "part")
    assert caught.value.received == "no blocks.7, nothing"
