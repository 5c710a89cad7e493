"""TensorRT's dialect, and a graph in two parts, compute what the standard graph does: every family, on ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.errors import GraphError
from mmdit_deploy.families import preset
from mmdit_deploy.graph.assemble import assemble
from mmdit_deploy.graph.census import implied_lowered
from mmdit_deploy.graph.extract import extract_segment
from mmdit_deploy.graph.lower import DIALECTS
from mmdit_deploy.graph.lower.joint_qk_norm import joint_qk_norm
from mmdit_deploy.graph.lower.mask_of_keys import mask_of_keys
from mmdit_deploy.graph.onnx_file import to_ir
from mmdit_deploy.graph.passes import run
from mmdit_deploy.graph.pipeline import Graphs, _spans
from mmdit_deploy.graph.split import SplitGraphs, split_graphs, through_table
from mmdit_deploy.graph.split_check import check_parts
from mmdit_deploy.graph.weight_spans import weight_bytes
from mmdit_deploy.model import calls, conditioning_calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.weights import planned_call_bytes, planned_layout
from mmdit_deploy.runtime import open_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs

RANGES = {"batch": Range(1, 2, 8), "img_tokens": Range(1, 64, 4096), "txt_tokens": Range(1, 16, 256)}
CASE = Case(2, 4, 6, 5, timestep=500.25)
DIALECTS_HERE = ("ort", "trt")
Values = Mapping[str, np.ndarray]
GraphsOf = Callable[..., Graphs]
SaveGraphs = Callable[..., Path]


def split_of(graphs: Graphs, spec: ModelSpec) -> SplitGraphs:
    """The parts, in both dialects."""
    expected = {dialect: implied_lowered(spec, dialect) for dialect in DIALECTS_HERE}
    contract = Contract.of(spec, PRECISIONS["fp32"], RANGES)
    return split_graphs(graphs.standard, calls(spec), contract, expected, Path("."))


def execute(model: onnx.ModelProto, values: Values, folder: Path) -> dict[str, np.ndarray]:
    session = open_session(model.SerializeToString(), "ort-cpu", weights_folder=folder)
    names = [o.name for o in session.get_outputs()]
    results = session.run(names, {i.name: values[i.name] for i in session.get_inputs()})
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


def given(spec: ModelSpec) -> dict[str, np.ndarray]:
    contract = Contract.of(spec, PRECISIONS["fp32"], RANGES)
    return {name: tensor.numpy() for name, tensor in case_inputs(CASE, contract, spec).items()}


def composed(split: SplitGraphs, dialect: str, values: Values, folder: Path) -> np.ndarray:
    made = execute(split.conditioning[dialect], values, folder)
    return execute(split.trunk[dialect], {**values, **made}, folder)["sample"]


def test_tensorrts_dialect_computes_what_the_standard_graph_does(
    tiny_families: Mapping[str, ModelSpec], family: str, graphs_of: GraphsOf, save_graphs: SaveGraphs, tmp_path: Path
) -> None:
    spec = tiny_families[family]
    folder = save_graphs(tmp_path, spec, RandomWeights(0), graphs_of(spec))
    standard = onnx.load(folder / "model.onnx", load_external_data=False)
    model = to_ir(standard, folder)
    # ONNX Runtime's Attention does not broadcast a mask over queries.
    results = run(model, [step for step in DIALECTS["trt"] if step is not mask_of_keys])
    assert {result.name: result.count for result in results}[joint_qk_norm.name] > 0
    mine, theirs = (execute(graph, given(spec), folder)["sample"] for graph in (ir.to_proto(model), standard))
    assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_the_parts_compute_the_whole_to_the_bit(
    tiny_families: Mapping[str, ModelSpec], family: str, graphs_of: GraphsOf, save_graphs: SaveGraphs, tmp_path: Path
) -> None:
    spec = tiny_families[family]
    graphs, values = graphs_of(spec), given(spec)
    split = split_of(graphs, spec)
    folder = save_graphs(tmp_path, spec, RandomWeights(1), graphs)
    whole = execute(graphs.lowered["ort"], values, folder)["sample"]
    assert np.array_equal(composed(split, "ort", values, folder), whole)
    if not spec.txt_mask:  # as TensorRT takes masks, ONNX Runtime does not
        made = composed(split, "trt", values, folder)
        assert np.linalg.norm(made - whole) <= 1e-5 * np.linalg.norm(whole)
    check_parts(graphs.lowered["ort"], split.conditioning["ort"], split.trunk["ort"])


def test_each_weight_is_in_one_part_and_the_trunk_makes_no_modulation(
    tiny_families: Mapping[str, ModelSpec], family: str, graphs_of: GraphsOf
) -> None:
    spec = tiny_families[family]
    graphs = graphs_of(spec)
    split = split_of(graphs, spec)
    own = {call.path for call in conditioning_calls(calls(spec))}
    assert own == {call.path for call in calls(spec) if call.modulates or call.path == "conditioning"} == {*split.calls}
    for dialect in DIALECTS_HERE:
        parts = weight_bytes(split.conditioning[dialect]), weight_bytes(split.trunk[dialect])
        assert sum(parts) == weight_bytes(graphs.standard) and all(parts)
    read = {tensor.name for tensor in split.trunk["ort"].graph.initializer}
    assert not [name for name in read if name.startswith(tuple(f"{path}." for path in own))]


def test_the_table_holds_the_modulations_in_the_order_of_the_calls(
    tiny_families: Mapping[str, ModelSpec], graphs_of: GraphsOf, save_graphs: SaveGraphs, tmp_path: Path
) -> None:
    """Two rows of a sample, at its timestep and at 0, lie side by side."""
    spec = tiny_families["qwen-image-edit-2511"]
    graphs = graphs_of(spec)
    split = split_of(graphs, spec)
    folder = save_graphs(tmp_path, spec, RandomWeights(1), graphs)
    modulating = [call.path for call in calls(spec) if call.modulates]
    whole = extract_segment(graphs.standard, split.calls, "conditioning")
    made = execute(whole, given(spec), folder)
    at_t, at_0 = (
        np.concatenate([made[name][rows, 0] for name in modulating], axis=1) for rows in (slice(2), slice(2, 4))
    )
    table = execute(split.conditioning["ort"], given(spec), folder)["modulation"]
    np.testing.assert_allclose(table, np.concatenate([at_t, at_0], axis=1), rtol=1e-5, atol=1e-6)
    assert split.contract.table.axes == ("batch", table.shape[1])


def test_contracts_are_parts_of_the_models(tiny_families: Mapping[str, ModelSpec], graphs_of: GraphsOf) -> None:
    spec = tiny_families["flux1"]
    split = split_of(graphs_of(spec), spec)
    for part, graphs in ((split.contract.conditioning, split.conditioning), (split.contract.trunk, split.trunk)):
        for graph in graphs.values():
            for tensors, values in ((part.inputs, graph.graph.input), (part.outputs, graph.graph.output)):
                axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
                assert axes == {t.name: list(t.axes) for t in tensors}
    assert {t.name for t in split.contract.conditioning.inputs} == {"timestep", "pooled_projections", "guidance"}
    assert split.contract.conditioning.ranges == {"batch": Range(1, 2 * 28, 8 * 64)}
    assert split.contract.table.dtype == "float32"


def exchange(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """Two tensors of one width lie in each other's place in the table."""
    (concat,) = [node for node in conditioning.graph.node if node.name == "modulation.tensors"]
    concat.input[0], concat.input[1] = concat.input[1], concat.input[0]


def shift(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """A slice begins and ends a column later."""
    for end in ("first", "end"):
        (node,) = [n for n in trunk.graph.node if n.name == f"modulation.modulations.0.txt.{end}"]
        node.attribute[0].ints[0] += 1


def misread(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """A block reads the modulation of its other stream."""
    (block,) = [node for node in trunk.graph.node if node.name == "blocks.0"]
    block.input[2], block.input[3] = block.input[3], block.input[2]


def lose(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """A call is missing."""
    trunk.graph.node.remove(next(node for node in trunk.graph.node if node.name == "blocks.1"))


def rewrite(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """A function lacks a node."""
    del trunk.functions[0].node[-1]


def point_elsewhere(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """A weight is read from another place of the file."""
    (weight,) = [t for t in trunk.graph.initializer if t.name == "final.proj.weight"]
    next(e for e in weight.external_data if e.key == "offset").value = "0"


def turn_the_sample_around(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """The last call's output is reversed, by nodes that say they belong to the table."""
    final = next(node for node in trunk.graph.node if "sample" in node.output)
    final.output[0] = "straight"
    ints = {"start": -1, "end": -(2**31), "axis": -1, "step": -1}
    for name, number in ints.items():
        made = f"modulation.{name}"
        trunk.graph.node.append(helper.make_node("Constant", [], [made], name=made, value_ints=[number]))
    read = ["straight", *(f"modulation.{name}" for name in ints)]
    trunk.graph.node.append(helper.make_node("Slice", read, ["sample"], name="modulation.final"))


def through_whole_numbers(value: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [value], [f"{name}.int"], name=f"{name}.int", to=onnx.TensorProto.INT64),
        helper.make_node("Cast", [f"{name}.int"], [name], name=name, to=onnx.TensorProto.FLOAT),
    ]


def round_the_sample(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """What the last call makes is cast to whole numbers and back."""
    final = next(node for node in trunk.graph.node if "sample" in node.output)
    final.output[0] = "exact"
    trunk.graph.node.extend(through_whole_numbers("exact", "sample"))


def round_what_a_block_reads(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """So is an input of a block."""
    index = next(i for i, node in enumerate(trunk.graph.node) if node.name == "blocks.1")
    block = trunk.graph.node[index]
    casts = through_whole_numbers(block.input[0], "rounded")
    block.input[0] = "rounded"
    for cast in reversed(casts):
        trunk.graph.node.insert(index, cast)


def round_the_table(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """So is a modulation tensor on its way into the table."""
    (index,) = [i for i, node in enumerate(conditioning.graph.node) if node.name == "modulation.tensors"]
    concat = conditioning.graph.node[index]
    casts = through_whole_numbers(concat.input[0], "modulation.rounded")
    concat.input[0] = "modulation.rounded"
    for cast in reversed(casts):
        conditioning.graph.node.insert(index, cast)


def stand_in_both(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """The trunk has the conditioning call too, with all that it reads."""
    (call,) = [node for node in conditioning.graph.node if node.name == "conditioning"]
    trunk.graph.node.insert(0, call)
    read = set(call.input)
    trunk.graph.input.extend(value for value in conditioning.graph.input if value.name in read)
    trunk.graph.initializer.extend(tensor for tensor in conditioning.graph.initializer if tensor.name in read)
    known = {function.name for function in trunk.functions}
    trunk.functions.extend(function for function in conditioning.functions if function.name not in known)


def exchange_the_names_of_nodes(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """Two nodes have one name, of which the last is right."""
    next(node for node in trunk.graph.node if node.name == "blocks.0").name = "blocks.1"


def change_an_input(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """An input is of another type."""
    next(v for v in trunk.graph.input if v.name == "hidden_states").type.tensor_type.elem_type = 10


def import_other_operators(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """Operators are those of an older opset."""
    next(opset for opset in trunk.opset_import if not opset.domain).version = 17


def import_others_in_a_function(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """They are in a function."""
    next(opset for opset in conditioning.functions[0].opset_import if not opset.domain).version = 17


def declare_an_attribute(conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """A function has an attribute more."""
    trunk.functions[0].attribute.append("epsilon")


FAULTS = (
    exchange, shift, misread, lose, rewrite, point_elsewhere, turn_the_sample_around, round_the_sample,
    round_what_a_block_reads, round_the_table, stand_in_both, exchange_the_names_of_nodes, change_an_input,
    import_other_operators, import_others_in_a_function, declare_an_attribute,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_are_not_the_whole_are_refused(
    fault: Callable[..., None], tiny_families: Mapping[str, ModelSpec], graphs_of: GraphsOf
) -> None:
    graphs = graphs_of(tiny_families["sd3-controlnet"])
    split = split_of(graphs, tiny_families["sd3-controlnet"])
    parts = [onnx.ModelProto(), onnx.ModelProto()]
    for part, made in zip(parts, (split.conditioning["ort"], split.trunk["ort"]), strict=True):
        part.CopyFrom(made)
    check_parts(graphs.lowered["ort"], *parts)
    fault(*parts)
    with pytest.raises(GraphError, match="the calls of the whole graph") as caught:
        check_parts(graphs.lowered["ort"], *parts)
    assert caught.value.received


def test_a_segment_takes_its_own_columns_and_another_is_not_changed(
    tiny_families: Mapping[str, ModelSpec], graphs_of: GraphsOf
) -> None:
    graphs = graphs_of(tiny_families["flux1"])
    split = split_of(graphs, tiny_families["flux1"])
    made = through_table(extract_segment(graphs.standard, ["blocks.1"], "part"), split.table)
    assert [value.name for value in made.graph.input] == ["blocks.0.img", "blocks.0.txt", "cos", "sin", "modulation"]
    assert {node.name for node in made.graph.node if node.op_type == "Unsqueeze"} == {
        f"modulation.modulations.1.{stream}" for stream in ("img", "txt")
    }
    without = extract_segment(graphs.standard, ["img_embed"], "part")
    assert through_table(without, split.table) == without


@pytest.mark.parametrize(
    ("name", "traced", "share"),
    [
        ("sd3.5-large", "sd3-controlnet", 0.33),
        ("flux1-dev", "flux1", 0.27),
        ("flux2-dev", "flux2", 0.02),
        ("qwen-image-edit-2511", "qwen-image-edit-2511", 0.33),
    ],
)
def test_a_third_of_the_weights_is_not_in_the_trunk_at_full_size(
    name: str, traced: str, share: float, tiny_families: Mapping[str, ModelSpec], graphs_of: GraphsOf
) -> None:
    """Measured on the spans of the weights file that the graphs read; the functions are those of a tiny model.

    A ControlNet's residuals, which that of SD3 takes, have no weights.
    """
    spec = dataclasses.replace(preset(name), residuals=tiny_families[traced].residuals)
    chain, plan = calls(spec), PrecisionPlan(PRECISIONS["fp16"])
    functions = {f.name: f for f in ir.from_proto(graphs_of(tiny_families[traced]).standard).functions.values()}
    layout = planned_layout(spec, plan)
    contract = Contract.of(spec, PRECISIONS["fp16"])
    model = assemble(name, chain, functions, contract, _spans(spec, layout), torch.float16, location="weights")
    whole = ir.to_proto(model)
    first = [call.path for call in conditioning_calls(chain)]
    sizes = [
        weight_bytes(extract_segment(whole, paths, "part"))
        for paths in (first, [call.path for call in chain if call.path not in first])
    ]
    assert sum(sizes) == weight_bytes(whole) == sum(planned_call_bytes(spec, plan).values())
    assert sizes[0] / sum(sizes) == pytest.approx(share, abs=0.01) and sizes[0] / sum(sizes) > share


@pytest.mark.parametrize(("name", "share"), [("sd3-medium", 0.33), ("sd3.5-medium", 0.34), ("qwen-image", 0.33)])
def test_nor_in_that_of_other_models_by_their_layout(name: str, share: float) -> None:
    spec = preset(name)
    by_call = planned_call_bytes(spec, PrecisionPlan(PRECISIONS["fp16"]))
    found = sum(by_call[call.path] for call in conditioning_calls(calls(spec))) / sum(by_call.values())
    assert share < found < share + 0.01
