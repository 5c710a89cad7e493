"""The standard graph: what it holds, who accepts it, and what it costs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import RandomWeights, weights_layout
from mmdit_deploy.contract import AXES, Contract, Range
from mmdit_deploy.errors import GraphError
from mmdit_deploy.families import preset
from mmdit_deploy.graph.census import census, check_census, implied, implied_lowered
from mmdit_deploy.graph.function_types import type_function_inputs
from mmdit_deploy.graph.fuse import FUSE
from mmdit_deploy.graph.lower import DIALECTS, lower
from mmdit_deploy.graph.named_functions import NAMED_FUNCTIONS
from mmdit_deploy.graph.passes import run
from mmdit_deploy.graph.pipeline import Graphs, build_graphs
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth
from mmdit_deploy.verify.metrics import compare

GraphsOf = Callable[..., Graphs]

CHANGES: dict[str, dict[str, object]] = {
    "plain": {},
    "one block": {"depth": 1},
    "no QK norm": {"qk_norm": False},
    "dual attention": {"depth": 4, "dual_attention_blocks": (0, 2)},
    "dual attention in the last block": {"depth": 1, "dual_attention_blocks": (0,)},
}
# Those that bundles hold.
DIALECT_LIST = ("ort", "ort-emulated-bf16", "trt", "standard-emulated-bf16")


def spec_with(spec: ModelSpec, name: str) -> ModelSpec:
    return dataclasses.replace(spec, **CHANGES[name])


def count_by_hand(graph: onnx.ModelProto, op_type: str) -> int:
    """Nodes that one run executes, counted on the proto and not by the code under test."""
    bodies = {f.name: f for f in graph.functions}
    return sum(sum(inner.op_type == op_type for inner in bodies[node.op_type].node) for node in graph.graph.node)


@pytest.mark.parametrize("change", CHANGES)
def test_the_census_is_what_the_spec_implies(tiny_spec: ModelSpec, graphs_of: GraphsOf, change: str) -> None:
    spec = spec_with(tiny_spec, change)
    graphs = graphs_of(spec)
    assert graphs.census == implied(spec)
    assert {op: count_by_hand(graphs.standard, op) for op in implied(spec)} == implied(spec)
    # Counted from the paper's figure: two streams a block, of which the last block's text ends after its QKV.
    duals = len(spec.dual_attention_blocks)
    assert implied(spec)["Attention"] == spec.depth + duals
    assert implied(spec)["RMSNormalization"] == (4 * spec.depth + 2 * duals if spec.qk_norm else 0)
    assert implied(spec)["LayerNormalization"] == 4 * spec.depth
    assert implied(spec)["Gelu"] == 2 * spec.depth - 1
    assert implied(spec)["MMDiTModulate"] == 4 * spec.depth + duals
    assert implied(spec)["MMDiTGatedResidual"] == 4 * spec.depth - 2 + duals
    assert implied(spec)["MMDiTSwiGLU"] == 0


@pytest.mark.soak  # with dual attention; in `make test` the paper's model of depth 24 has a real width
def test_a_real_width_gives_the_same_census() -> None:
    """The exporter merges equal constants up to 1024 elements only; SD3.5-Medium's norms have 1536."""
    spec, fp16 = preset("sd3.5-medium"), PRECISIONS["fp16"]
    layout = weights_layout(spec, torch.float16)
    graphs = build_graphs(spec, Contract.of(spec, fp16), fp16, layout, dialects=("ort",))
    assert graphs.census == implied(spec)


def test_a_pass_that_does_not_fire_is_an_error(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    """Each pass of the dialect that does something is missed when it is left out, also on dual-attention blocks."""
    for change in CHANGES:
        spec = spec_with(tiny_spec, change)
        standard = ir.from_proto(graphs_of(spec).standard)
        type_function_inputs(standard, standard.functions)
        fired = {result.name for result in lower(standard, "ort")[1] if result.count}
        assert fired == {step.name for step in DIALECTS["ort"]} - {"rotary embedding"}  # SD3 has none
        for left_out in fired:
            model = standard.clone()
            for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
                imports["com.microsoft"] = 1
            run(model, [step for step in DIALECTS["ort"] if step.name != left_out])
            with pytest.raises(GraphError, match="the ort graph has each attention and norm"):
                check_census(model, implied_lowered(spec, "ort"), "ort")


def test_every_attention_and_every_linear_layer_is_lowered(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    for change in CHANGES:
        spec = spec_with(tiny_spec, change)
        graph = graphs_of(spec).lowered["ort"]
        assert count_by_hand(graph, "Attention") == 0
        assert count_by_hand(graph, "MultiHeadAttention") == implied(spec)["Attention"]
        assert count_by_hand(graph, "MatMul") == 0


def test_an_attention_left_in_pieces_is_an_error(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(graphs_of(tiny_spec).standard)
    body = next(f for f in broken.functions if f.name == "MMDiTJointBlock")
    node = next(n for n in body.node if n.op_type == "Attention")
    node.op_type = "Softmax"
    with pytest.raises(GraphError) as caught:
        check_census(ir.from_proto(broken), implied(tiny_spec), "standard")
    assert "Attention: expected 2, found 1" in str(caught.value)
    assert "Softmax: expected 0, found 1" in str(caught.value)
    assert caught.value.exit_status == 3


def test_a_graph_of_another_model_is_an_error(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    graph = ir.from_proto(graphs_of(tiny_spec).standard)
    with pytest.raises(GraphError, match="RMSNormalization: expected 0, found 8"):
        check_census(graph, implied(dataclasses.replace(tiny_spec, qk_norm=False)), "standard")


def test_the_census_counts_a_function_once_per_call(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    graph = ir.from_proto(graphs_of(dataclasses.replace(tiny_spec, depth=6)).standard)
    assert census(graph)["Attention"] == 6
    assert sum(n.op_type == "Attention" for f in graph.functions.values() for n in f) == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_checker_accepts_it(
    tiny_spec: ModelSpec,
    graphs_of: GraphsOf,
    save_graphs: Callable[..., Path],
    tmp_path: Path,
    precision: str,
) -> None:
    graphs = graphs_of(tiny_spec, precision, DIALECT_LIST)
    save_graphs(tmp_path, tiny_spec, RandomWeights(0), graphs, precision)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    for dialect in DIALECT_LIST:
        onnx.checker.check_model(tmp_path / f"model.{dialect}.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_polygraphy_runs_it_as_it_is(
    tiny_spec: ModelSpec,
    graphs_of: GraphsOf,
    save_graphs: Callable[..., Path],
    tmp_path: Path,
    precision: str,
) -> None:
    pytest.importorskip("polygraphy")
    save_graphs(tmp_path, tiny_spec, RandomWeights(0), graphs_of(tiny_spec, precision), precision)
    contract = Contract.of(tiny_spec, PRECISIONS[precision])
    sizes = {"batch": 2, "img_tokens": 35, "txt_tokens": 9}
    shapes = [f"{t.name}:[{','.join(map(str, t.shape(sizes)))}]" for t in contract.inputs]
    command = ["run", "model.onnx", "--onnxrt", "--providers", "cpu", "--input-shapes", *shapes]
    found = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), *command, "--validate"],
        cwd=tmp_path,
        env={**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "PASSED" in found.stdout and "sample" in found.stdout


def test_function_names_are_unique_and_no_ops(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    """TensorRT's parser looks functions up by their name alone, after its built-ins."""
    graph = graphs_of(spec_with(tiny_spec, "dual attention")).standard
    names = [f.name for f in graph.functions]
    assert len(names) == len(set(names))
    assert not set(names) & {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    calls = [graph.graph.node, *(f.node for f in graph.functions)]
    assert set(names) <= {node.op_type for nodes in calls for node in nodes}
    assert {f.domain for f in graph.functions} == {"mmdit"}
    assert {(o.domain, o.version) for o in graph.opset_import} == {("", 23), ("mmdit", 1)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_value_of_a_function_has_a_type_and_a_rank(
    tiny_spec: ModelSpec, graphs_of: GraphsOf, precision: str
) -> None:
    """Rewrite rules see nothing else of a function's body. The named ones, which they do not read, are of any type."""
    traced = [
        f for f in graphs_of(tiny_spec, precision, DIALECT_LIST).standard.functions if f.name not in NAMED_FUNCTIONS
    ]
    assert len(traced) == 8
    for function in traced:
        typed = {v.name: v.type.tensor_type for v in function.value_info}
        for name in [*function.input, *(out for node in function.node for out in node.output if out)]:
            assert name in typed, (function.name, name)
            assert typed[name].elem_type and typed[name].HasField("shape"), (function.name, name)


def test_weights_are_inputs_of_the_functions(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    """No body holds a weight: what lies in it are a few constants of at most one row."""
    for function in graphs_of(tiny_spec).standard.functions:
        for node in function.node:
            for attribute in node.attribute:
                assert attribute.t.ByteSize() < 1024
                assert not attribute.HasField("g")


def test_depth_changes_nothing_but_the_calls(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    """The deeper graph is traced anew, not built from the shallow one's functions."""
    two = graphs_of(tiny_spec, "fp16", DIALECT_LIST).standard
    compute, deep = PRECISIONS["fp16"], dataclasses.replace(tiny_spec, depth=6)
    layout = weights_layout(deep, torch.float16)
    six = build_graphs(deep, Contract.of(deep, compute), compute, layout, dialects=()).standard
    by_name = [{f.name: f.SerializeToString(deterministic=True) for f in g.functions} for g in (two, six)]
    assert by_name[0] == by_name[1]
    assert len(six.graph.node) - len(two.graph.node) == 4 * 3  # per block: the block and its two modulations


def test_the_symbolic_axes_are_the_contracts(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    graph = graphs_of(tiny_spec).standard.graph
    contract = Contract.of(tiny_spec, PRECISIONS["fp32"])
    for values, tensors in ((graph.input, contract.inputs), (graph.output, contract.outputs)):
        assert [v.name for v in values] == [t.name for t in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert dims == list(tensor.axes)
    symbols = {d.dim_param for v in graph.value_info for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert symbols == set(AXES)


def test_the_graph_of_the_paper_s_depth_24_is_small(graphs_of: GraphsOf) -> None:
    graphs = graphs_of(from_depth(24), "fp16", ("ort",))
    assert graphs.standard.ByteSize() <= 300_000
    assert graphs.lowered["ort"].ByteSize() <= 300_000
    assert len(graphs.standard.graph.node) == 24 * 3 + 5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_spans_of_one_file(tiny_spec: ModelSpec, graphs_of: GraphsOf, precision: str) -> None:
    """In the planned layout, each where its tensors lie; Q, K and V of one projection as one span."""
    dtype = getattr(torch, PRECISIONS[precision].dtype)
    spec = spec_with(tiny_spec, "dual attention")
    graphs = graphs_of(spec, precision, ("ort",))
    layout = weights_layout(spec, dtype, {"format": "pt"})
    by_path = {p.path: p for p in parameters(spec)}
    for graph in (graphs.standard, graphs.lowered["ort"]):
        seen = set()
        for tensor in graph.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert tensor.name.endswith(".frequencies")
                continue
            entries = {e.key: e.value for e in tensor.external_data}
            parts = [layout.tensors[p.key] for p in by_path[tensor.name].parts]
            offset, length = int(entries["offset"]), int(entries["length"])
            assert entries["location"] == "weights.safetensors"
            assert offset == parts[0].offset and length == sum(p.nbytes for p in parts)
            assert 0 < offset and offset + length <= layout.total_bytes
            assert length == torch.Size(tensor.dims).numel() * dtype.itemsize
            for before, after in itertools.pairwise(parts):
                assert before.offset + before.nbytes == after.offset
            seen.add(tensor.name)
        assert seen == set(by_path)


def test_a_layout_that_parts_q_from_k_is_refused(tiny_spec: ModelSpec) -> None:
    layout = weights_layout(tiny_spec, torch.float32)
    key = "transformer_blocks.0.attn.to_k.weight"
    moved = dataclasses.replace(layout.tensors[key], offset=layout.tensors[key].offset + 4)
    torn = dataclasses.replace(layout, tensors={**layout.tensors, key: moved})
    with pytest.raises(ValueError, match=r"to_q\.weight and .*to_k\.weight"):
        compute = PRECISIONS["fp32"]
        build_graphs(tiny_spec, Contract.of(tiny_spec, compute), compute, torn, dialects=())


def test_a_second_run_of_every_pass_changes_nothing(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    graphs = graphs_of(tiny_spec, "bf16", DIALECT_LIST)
    pairs = [(graphs.standard, FUSE), *((graphs.lowered[name], DIALECTS[name]) for name in DIALECT_LIST)]
    for proto, passes in pairs:
        model = ir.from_proto(proto)
        assert {step.name: step.apply(model) for step in passes} == {step.name: 0 for step in passes}


def test_every_pass_says_how_often_it_fired(
    tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec], graphs_of: GraphsOf
) -> None:
    passes = graphs_of(tiny_spec, "bf16", DIALECT_LIST).passes
    assert set(passes) == {"standard", *DIALECT_LIST}
    fired = {result.name for result in passes["standard"] if result.count}
    # The exporter writes one op for all else that fusing finds in others' graphs, and SD3 has no SwiGLU.
    assert fired == {"attention layout", "SiLU", "modulate", "gated residual"}
    lowered = [result for dialect in DIALECT_LIST for result in passes[dialect]]
    idle = {result.name for result in lowered if result.count == 0}
    # SD3 has none, and nothing is quantized.
    assert idle == {
        "mask of keys",
        "rotary embedding",
        "RoPE spelled out",
        "FP8 attention spelled out",
        "functions by call",
    }
    masked = graphs_of(tiny_families["qwen-image"], "fp16", ("trt",)).passes["trt"]
    assert {result.name: result.count for result in masked}["mask of keys"] == 2


def test_block_outputs(
    tiny_spec: ModelSpec,
    graphs_of: GraphsOf,
    save_graphs: Callable[..., Path],
    eager_model: Callable[..., MMDiT],
    tmp_path: Path,
) -> None:
    """An intermediate feature on request is an output of the graph, equal to the eager model's."""
    spec = dataclasses.replace(tiny_spec, depth=3)
    names = ("blocks.1", "blocks.0")
    graphs = graphs_of(spec, outputs=names)
    assert [o.name for o in graphs.standard.graph.output] == ["sample", *names]
    folder = save_graphs(tmp_path, spec, RandomWeights(1), graphs)
    feed = sample_inputs(spec)
    with torch.inference_mode():
        expected = eager_model(spec, RandomWeights(1))(**feed, outputs=names)
    assert isinstance(expected, tuple)
    wanted = [(n, torch.float32, tuple(t.shape)) for n, t in zip(("sample", *names), expected, strict=True)]
    for graph in ("model.onnx", "model.ort.onnx"):
        received = run_session(open_session(folder / graph, "ort-cpu"), feed, wanted)
        for (name, *_), reference in zip(wanted, expected, strict=True):
            assert compare(received[name], reference).rel_l2 <= 1e-5


def test_the_emulated_dialect_rounds_like_bf16(
    tiny_spec: ModelSpec,
    graphs_of: GraphsOf,
    save_graphs: Callable[..., Path],
    eager_model: Callable[..., MMDiT],
    tmp_path: Path,
) -> None:
    """Neither as exact as fp32, nor worse than bf16 may be."""
    graphs = graphs_of(tiny_spec, "bf16", DIALECT_LIST)
    folder = save_graphs(tmp_path, tiny_spec, RandomWeights(1), graphs, "bf16")
    feed = {n: t.bfloat16() if n not in ("timestep", "img_ids") else t for n, t in sample_inputs(tiny_spec).items()}
    session = open_session(folder / "model.ort-emulated-bf16.onnx", "ort-cpu")
    received = run_session(session, feed, [("sample", torch.bfloat16, (2, 35, tiny_spec.out_dim))])["sample"]
    with torch.inference_mode():
        expected = eager_model(tiny_spec, RandomWeights(1))(**{n: t.float() for n, t in feed.items()})
    assert 1e-3 < compare(received, expected).rel_l2 <= 2e-2


def sample_inputs(spec: ModelSpec) -> dict[str, Tensor]:
    """Two samples of 5 × 7 image and 9 text tokens."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 35, spec.img_dim, generator=generator),
        "encoder_hidden_states": torch.randn(2, 9, spec.txt_dim, generator=generator),
        "timestep": torch.tensor([999.0, 3.5]),
        "pooled_projections": torch.randn(2, spec.pooled_dim, generator=generator),
        "img_ids": grid_ids(5, 7),
    }


def test_one_more_range_changes_no_graph(tiny_spec: ModelSpec, graphs_of: GraphsOf) -> None:
    """Ranges are the contract's; the graph is dynamic over all sizes."""
    compute = PRECISIONS["fp32"]
    narrow = Contract.of(tiny_spec, compute, {"batch": Range(2, 2, 2)})
    assert narrow.inputs == Contract.of(tiny_spec, compute).inputs
    assert graphs_of(tiny_spec).standard.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
