"""TensorRT's dialect computes what the standard graph does: no engine runs here, but ONNX Runtime reads its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.graph.lower import DIALECTS
from mmdit_deploy.graph.lower.joint_qk_norm import joint_qk_norm
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.onnx_file import to_ir
from mmdit_deploy.graph.passes import run
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec, precision

SIZES = {"batch": 2, "img_tokens": 35, "txt_tokens": 9}


def inputs(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Two samples; ids are small whole numbers, and all text counts."""
    generator = np.random.default_rng(5)
    made = {}
    for tensor in Contract.of(spec, precision("fp32")).inputs:
        shape = tensor.shape(SIZES)
        if tensor.dtype == "bool":
            made[tensor.name] = np.ones(shape, dtype=bool)
        elif tensor.name.endswith("_ids"):
            made[tensor.name] = generator.integers(0, 7, shape).astype(np.float32)
        else:
            made[tensor.name] = generator.standard_normal(shape).astype(np.float32)
    return made


def outputs(path: Path, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    return [np.asarray(out) for out in session.run(None, {n: v for n, v in feed.items() if n in taken})]


def test_the_numbers_are_those_of_the_standard_graph(
    tiny_families: Mapping[str, ModelSpec],
    family: str,
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    spec = tiny_families[family]
    folder = save_graphs(tmp_path, spec, RandomWeights(0), graphs_of(spec))
    model = to_ir(onnx.load(folder / "model.onnx", load_external_data=False), folder)
    # ONNX Runtime's Attention does not broadcast a mask over queries.
    results = run(model, [step for step in DIALECTS["trt"] if step is not mask_of_keys])
    count = {result.name: result.count for result in results}
    assert count[joint_qk_norm.name] > 0
    onnx.save(ir.to_proto(model), folder / "model.trt.onnx")
    feed = inputs(spec)
    mine, theirs = outputs(folder / "model.trt.onnx", feed), outputs(folder / "model.onnx", feed)
    for a, b in zip(mine, theirs, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
