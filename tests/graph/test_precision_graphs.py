"""Whole models with a precision plan: few variants, scales from the weights file, and the numbers of the plan."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.eager.program import Program
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.census import check_census, implied, implied_lowered
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.graph.function_types import callers_first, type_function_inputs
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.graph.modulations import check_modulations
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.graph.precision.apply import apply_plan
from mmdit_deploy.graph.split import SplitGraphs, split_graphs
from mmdit_deploy.graph.split_check import check_parts
from mmdit_deploy.model import Call, calls
from mmdit_deploy.precision import SCHEMES, AttentionScales, LinearPlan, PrecisionPlan, linears, role_of
from mmdit_deploy.precision.quantize import attention_scales, quantize_weight, simulate, simulate_attention
from mmdit_deploy.precision.structure import attentions, unread
from mmdit_deploy.precision.weights import planned_layout
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec, precision
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.metrics import compare

SOURCE = RandomWeights(3)
CASE = Case(2, 4, 6, 5, timestep=500.25)
BLOCKS = ("attention", "mlp")
# ONNX Runtime and torch sum in another order, which moves a number into the next step of its format now and then. One
# call comes to 1e-6 where none is moved; through a whole model one that is moved in the first block moves others.
LOCAL, WHOLE = 2e-4, 5e-3

PlannedGraphs = Callable[..., Graphs]
Save = Callable[..., Path]
Programs = Callable[..., Mapping[str, Program]]


def linear_plan(name: str, columns: int) -> LinearPlan:
    scheme = SCHEMES[name]
    amax = 6.0 if scheme.activations in ("tensor", "block") else None
    return LinearPlan(scheme, amax, torch.linspace(0.5, 2, columns).bfloat16().float() if scheme.smooth else None)


def plan_of(
    spec: ModelSpec,
    schemes: Sequence[str] = ("fp8",),
    compute: str = "fp32",
    *,
    roles: Sequence[str] = BLOCKS,
    modulation: str | None = None,
    fp8_attention: bool = False,
    base: str | None = None,
    **more: Any,
) -> PrecisionPlan:
    """Each layer of a block gets the next of the schemes."""
    planned: dict[str, LinearPlan] = {}
    for path, parameter in linears(spec).items():
        role, columns = role_of(path), parameter.shape[1]
        if path in unread(spec) or (role not in roles and not (role == "modulation" and modulation)):
            continue
        place = sum(other.rpartition(".")[0].split(".")[:2] == path.split(".")[:2] for other in planned)
        name = modulation if role == "modulation" and modulation else schemes[place % len(schemes)]
        if columns % (SCHEMES[name].block or 1) == 0:
            planned[path] = linear_plan(name, columns)
    scales = AttentionScales(5.0, 6.0, 3.0)
    in_fp8 = {call: (scales,) * count for call, count in attentions(spec).items()} if fp8_attention else {}
    return PrecisionPlan(PRECISIONS[compute] if base is None else precision(compute, base), planned, in_fp8, **more)


def in_ir(graph: onnx.ModelProto) -> ir.Model:
    """As passes read it: functions of a file do not say of what type their inputs are."""
    model = ir.from_proto(graph)
    type_function_inputs(model, callers_first(model))
    return model


def inputs_of(spec: ModelSpec, plan: PrecisionPlan) -> dict[str, Tensor]:
    return case_inputs(CASE, Contract.of(spec, plan.precision), spec)


def torch_calls(
    spec: ModelSpec, plan: PrecisionPlan, programs: Mapping[str, Program]
) -> Iterator[tuple[Call, dict[str, Tensor], tuple[Tensor, ...]]]:
    """Each call, what it is given by name and what it makes; computed as the plan says, operator by operator."""
    compute, eager = getattr(torch, plan.precision.dtype), EagerCalls(spec, SOURCE)
    values = {n: t.float() if t.is_floating_point() else t for n, t in inputs_of(spec, plan).items()}
    for call in calls(spec):
        program, in_fp8 = programs[call.kind.function], iter(plan.attentions.get(call.path, ()))

        def replaced(node: torch.fx.Node, args: Sequence[Any]) -> Tensor | None:
            if node.target is torch.ops.aten.linear.default:
                path = f"{call.path}.{program.names[node.args[1].name].removesuffix('.weight')}"  # type: ignore[union-attr] # noqa: B023
                if path in plan.linears:
                    stored = quantize_weight(args[1], plan.linears[path], compute)
                    made = simulate(args[0], stored, plan.linears[path].scheme, compute)
                    return made if len(args) < 3 or args[2] is None else made + args[2]
            if node.target is torch.ops.aten.scaled_dot_product_attention.default:
                amax = next(in_fp8, None)  # noqa: B023
                if amax is not None:
                    scales = attention_scales(amax, args[0].shape[-1], compute)
                    made = simulate_attention(*args[:3], scales, args[3] if len(args) > 3 else None)
                    return made.transpose(1, 2).contiguous().transpose(1, 2)  # as SDPA lays it out
            return None

        given = dict(zip([t.name for t in call.kind.inputs], [values[n] for n in call.inputs], strict=True))
        made = program.run(given, eager.weights(call), replace=replaced)
        yield call, {name: values[name] for name in call.inputs}, made
        values.update(zip(call.outputs, made, strict=True))


def torch_sample(spec: ModelSpec, plan: PrecisionPlan, programs: Mapping[str, Program]) -> Tensor:
    *_, (_, _, (sample,)) = torch_calls(spec, plan, programs)
    return sample


def ort_sample(folder: Path, name: str, spec: ModelSpec, plan: PrecisionPlan) -> Tensor:
    compute = getattr(torch, plan.precision.dtype)
    wanted = [("sample", compute, (CASE.batch, CASE.rows * CASE.cols, spec.out_dim))]
    return run_session(open_session(folder / name, "ort-cpu"), inputs_of(spec, plan), wanted)["sample"].float()


def open_call(folder: Path, graph: onnx.ModelProto, call: Call) -> Any:
    """A session of one call, beside the weights."""
    onnx.save(extract_call(graph, call.path), folder / "call.onnx")
    return open_session(folder / "call.onnx", "ort-cpu")


@pytest.fixture
def family_spec(tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec]) -> Callable[[str], ModelSpec]:
    dual = dataclasses.replace(tiny_spec, depth=3, dual_attention_blocks=(0, 1))
    return lambda name: {"sd3.5-medium": dual, "sd3": tiny_spec, **tiny_families}[name]


@pytest.mark.parametrize("name", ["sd3", "sd3.5-medium", "flux1", "flux2", "qwen-image"])
def test_every_family_computes_what_the_plan_says(
    name: str,
    family_spec: Callable[[str], ModelSpec],
    planned_graphs: PlannedGraphs,
    save_planned: Save,
    programs_for: Programs,
    tmp_path: Path,
) -> None:
    """Every scheme but FP4 in one model, with FP8 attentions and modulations of FP8 weights; in three dialects."""
    spec = family_spec(name)
    schemes = [scheme for scheme in SCHEMES if scheme != "fp4"]
    plan = plan_of(spec, schemes, modulation="fp8-weights", fp8_attention=True)
    graphs = planned_graphs(spec, plan, ("ort", "trt"))
    folder = save_planned(tmp_path, spec, SOURCE, plan, graphs)
    programs, plain = programs_for(spec), EagerCalls(spec, SOURCE)
    for call, given, made in torch_calls(spec, plan, programs):
        if "." in call.path:
            session = open_call(folder, graphs.standard, call)
            wanted = [(n, torch.float32, tuple(t.shape)) for n, t in zip(call.outputs, made, strict=True)]
            received = run_session(session, given, wanted)
            without = plain.load(call)(list(given.values()))
            for name, expected, unquantized in zip(call.outputs, made, without, strict=True):
                assert compare(received[name], expected).rel_l2 <= LOCAL, call.path
                assert compare(unquantized, expected).rel_l2 > 5 * LOCAL  # the quantization is seen
    for file in ("model.onnx", "model.ort.onnx", "model.trt.onnx"):
        onnx.checker.check_model(folder / file, full_check=True)
        assert compare(ort_sample(folder, file, spec, plan), made[0]).rel_l2 <= WHOLE, file
    used = Counter(linear.scheme.name for linear in plan.linears.values())
    assert {s: graphs.census[f"MatMul ({s})"] for s in SCHEMES} == {s: used[s] for s in SCHEMES}
    joined = [node.name for node in graphs.of("trt").graph.node if ".." in node.name and node.op_type == "MatMul"]
    modulations = [call.path for call in calls(spec) if call.modulates]
    assert len(joined) == 1 and check_modulations(graphs.of("trt"), graphs.standard, modulations) == len(modulations)


def test_fp4_is_emulated_on_the_same_bytes(
    tiny_spec: ModelSpec,
    planned_graphs: PlannedGraphs,
    save_planned: Save,
    programs_for: Programs,
    tmp_path: Path,
) -> None:
    plan = plan_of(tiny_spec, ("fp4",), fp8_attention=True)
    dialects = ("standard-emulated-fp4", "ort-emulated-fp4")
    graphs = planned_graphs(tiny_spec, plan, dialects)
    folder = save_planned(tmp_path, tiny_spec, SOURCE, plan, graphs)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    expected = torch_sample(tiny_spec, plan, programs_for(tiny_spec))
    initializers = {t.name: t for t in graphs.standard.graph.initializer}
    weight = "blocks.0.img.qkv.proj.weight"
    assert initializers[weight].data_type == onnx.TensorProto.FLOAT4E2M1 and initializers[weight].dims == [192, 64]
    for dialect in dialects:
        lowered = {t.name: t for t in graphs.of(dialect).graph.initializer}
        assert lowered[weight].data_type == onnx.TensorProto.UINT8 and lowered[weight].dims == [192, 32]
        assert lowered[weight].external_data == initializers[weight].external_data
        made = ort_sample(folder, f"model.{dialect}.onnx", tiny_spec, plan)
        assert compare(made, expected).rel_l2 <= WHOLE, dialect


@pytest.mark.parametrize(
    ("name", "dialects"),
    [
        ("fp8", ("standard-emulated-bf16", "ort-emulated-bf16")),
        ("fp4", ("standard-emulated-fp4-bf16", "ort-emulated-fp4-bf16")),
    ],
)
def test_a_bf16_base_is_emulated_with_its_roundings(
    name: str,
    dialects: tuple[str, ...],
    tiny_spec: ModelSpec,
    planned_graphs: PlannedGraphs,
    save_planned: Save,
    programs_for: Programs,
    tmp_path: Path,
) -> None:
    plan = plan_of(tiny_spec, (name,), name, base="bf16", fp8_attention=True, modulation="fp8-weights")
    graphs = planned_graphs(tiny_spec, plan, dialects)
    folder = save_planned(tmp_path, tiny_spec, SOURCE, plan, graphs)
    expected = torch_sample(tiny_spec, plan, programs_for(tiny_spec))  # which sums in fp32 and rounds scales to bf16
    for dialect in dialects:
        made = ort_sample(folder, f"model.{dialect}.onnx", tiny_spec, plan)
        assert compare(made, expected).rel_l2 <= 3e-2, dialect


def test_calls_of_one_structure_share_a_variant(tiny_spec: ModelSpec, planned_graphs: PlannedGraphs) -> None:
    spec = dataclasses.replace(tiny_spec, depth=8)
    graph = planned_graphs(spec, plan_of(spec, modulation="fp8-weights", fp8_attention=True)).standard
    blocks = Counter(node.op_type for node in graph.graph.node if node.name.startswith("blocks."))
    assert blocks == {"MMDiTJointBlock_fp8": 7, "MMDiTLastJointBlock_fp8": 1}
    modulations = Counter(node.op_type for node in graph.graph.node if "modulation" in node.name)
    assert modulations == {"MMDiTModulation6_fp8_weights": 15, "MMDiTModulation2_fp8_weights": 2}
    functions = {f.name for f in graph.functions}
    assert not functions & {"MMDiTJointBlock", "MMDiTLastJointBlock", "MMDiTModulation6", "MMDiTModulation2"}
    assert {"MMDiTFP8Attention", "MMDiTFinalLayer"} < functions


def test_calls_of_unlike_structure_get_variants_of_their_own(
    tiny_spec: ModelSpec, planned_graphs: PlannedGraphs
) -> None:
    spec = dataclasses.replace(tiny_spec, depth=6)
    plan = plan_of(spec, roles=("mlp",))
    changed = dict(plan.linears)
    changed["blocks.1.img.mlp.up"] = linear_plan("int8", 64)  # one layer in another scheme
    del changed["blocks.2.img.mlp.up"]  # one layer less
    changed = {path: linear for path, linear in changed.items() if not path.startswith("blocks.3.")}
    graph = planned_graphs(spec, dataclasses.replace(plan, linears=changed)).standard
    ops = {node.name: node.op_type for node in graph.graph.node}
    assert [ops[f"blocks.{i}"] for i in range(5)] == [
        "MMDiTJointBlock_fp8",
        "MMDiTJointBlock_int8_fp8",
        "MMDiTJointBlock_fp8_2",
        "MMDiTJointBlock",
        "MMDiTJointBlock_fp8",
    ]


def test_scales_are_inputs_of_functions_and_lie_in_the_weights_file(
    tiny_spec: ModelSpec, planned_graphs: PlannedGraphs
) -> None:
    plan = plan_of(tiny_spec, fp8_attention=True)
    graph, layout = planned_graphs(tiny_spec, plan).standard, planned_layout(tiny_spec, plan, {"format": "pt"})
    function = next(f for f in graph.functions if f.name == "MMDiTJointBlock_fp8")
    call = next(node for node in graph.graph.node if node.name == "blocks.0")
    given = dict(zip(function.input, call.input, strict=True))
    weight, *scales = (f"img.mlp.down.{n}" for n in ("weight", "weight_scale", "channel_scale", "input_scale"))
    assert [given[name] for name in (weight, *scales)] == [f"blocks.0.{name}" for name in (weight, *scales)]
    assert [given[f"attention.0.{x}_scale"] for x in "qkv"] == [f"blocks.0.attention.0.{x}_scale" for x in "qkv"]
    initializers = {t.name: t for t in graph.graph.initializer}
    assert initializers[f"blocks.0.{weight}"].data_type == onnx.TensorProto.FLOAT8E4M3FN
    for name in scales:
        external = {entry.key: entry.value for entry in initializers[f"blocks.0.{name}"].external_data}
        info = layout.tensors[f"blocks.0.{name}"]
        assert (int(external["offset"]), int(external["length"])) == (info.offset, info.nbytes)


def test_a_deep_model_is_a_small_file(tiny_spec: ModelSpec, planned_graphs: PlannedGraphs) -> None:
    spec = dataclasses.replace(tiny_spec, depth=24)
    graph = planned_graphs(spec, plan_of(spec, modulation="fp8-weights", fp8_attention=True)).standard
    assert len(graph.SerializeToString()) < 300_000


def test_values_in_fp32_pass_from_call_to_call(
    tiny_spec: ModelSpec,
    planned_graphs: PlannedGraphs,
    save_planned: Save,
    programs_for: Programs,
    tmp_path: Path,
) -> None:
    """The image's residual stream is fp32 between the blocks; the text's is not, and the last block takes fp16."""
    spec = dataclasses.replace(tiny_spec, depth=3)
    wide = {f"blocks.{i}": frozenset({"hidden_states", "img_out"} if i else {"img_out"}) for i in range(2)}
    plan = plan_of(spec, ("fp8", "fp8-token", "int8"), "fp8", base="fp16", wide=wide)
    graphs = planned_graphs(spec, plan, ("ort", "trt"))
    types = {v.name: v.type.tensor_type.elem_type for v in graphs.standard.graph.value_info}
    assert {n: types[n] for n in ("img_embed", "blocks.0.img", "blocks.1.img", "blocks.1.txt")} == {
        "img_embed": onnx.TensorProto.FLOAT16,
        "blocks.0.img": onnx.TensorProto.FLOAT,
        "blocks.1.img": onnx.TensorProto.FLOAT,
        "blocks.1.txt": onnx.TensorProto.FLOAT16,
    }
    ops = [next(n.op_type for n in graphs.standard.graph.node if n.name == f"blocks.{i}") for i in range(3)]
    stem = "JointBlock_fp8_fp8_token_int8"
    assert ops == [f"MMDiT{stem}_fp32", f"MMDiT{stem}_fp32_2", f"MMDiTLast{stem}_fp32in"]
    folder = save_planned(tmp_path, spec, SOURCE, plan, graphs)
    expected = torch_sample(spec, plan, programs_for(spec))
    for file in ("model.onnx", "model.ort.onnx", "model.trt.onnx"):
        onnx.checker.check_model(folder / file, full_check=True)
        assert compare(ort_sample(folder, file, spec, plan), expected).rel_l2 <= 2e-2, file  # of fp16 and its steps


def split_of(graphs: Graphs, spec: ModelSpec, plan: PrecisionPlan, dialects: Sequence[str]) -> SplitGraphs:
    expected = {dialect: implied_lowered(spec, dialect, plan) for dialect in dialects}
    return split_graphs(graphs.standard, calls(spec), Contract.of(spec, plan.precision), expected, Path("."))


def sampled_in_two(split: SplitGraphs, folder: Path, spec: ModelSpec, plan: PrecisionPlan) -> Tensor:
    """What the conditioning and the trunk make together, in ONNX Runtime."""
    values, sizes = inputs_of(spec, plan), {"batch": CASE.batch, "img_tokens": CASE.rows * CASE.cols}
    for graph, contract in (
        (split.conditioning, split.contract.conditioning),
        (split.trunk, split.contract.trunk),
    ):
        (dialect,) = (name for name in graph if name.startswith("ort"))
        session = open_session(graph[dialect].SerializeToString(), "ort-cpu", weights_folder=folder)
        out = [(t.name, getattr(torch, t.dtype), t.shape(sizes)) for t in contract.outputs]
        values |= run_session(session, {t.name: values[t.name] for t in contract.inputs}, out)
    return values["sample"].float()


def test_a_plan_of_modulation_survives_the_cut_in_two(
    tiny_spec: ModelSpec, planned_graphs: PlannedGraphs, save_planned: Save, tmp_path: Path
) -> None:
    """Quantized in the conditioning; what one of its calls keeps in fp32 passes the table in fp32, the others too."""
    wide = {"modulations.1.img": frozenset({"modulation"}), "blocks.1": frozenset({"img_modulation"})}
    plan = plan_of(tiny_spec, ("fp8",), "fp8", base="fp16", modulation="fp8-weights", wide=wide)
    graphs = planned_graphs(tiny_spec, plan, ("ort",))
    split = split_of(graphs, tiny_spec, plan, ("ort", "trt"))
    assert {t.name: t.dtype for t in split.contract.trunk.inputs}["modulation"] == "float32"
    for part, has in ((split.conditioning, True), (split.trunk, False)):
        names = {t.name for t in part["trt"].graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN}
        assert any("modulation" in name for name in names) == has
    folder = save_planned(tmp_path, tiny_spec, SOURCE, plan, graphs)
    whole = ort_sample(folder, "model.ort.onnx", tiny_spec, plan)
    assert torch.equal(sampled_in_two(split, folder, tiny_spec, plan), whole)
    check_parts(graphs.lowered["ort"], split.conditioning["ort"], split.trunk["ort"])


def test_so_does_a_bf16_base_where_it_is_emulated(
    tiny_spec: ModelSpec, planned_graphs: PlannedGraphs, save_planned: Save, tmp_path: Path
) -> None:
    plan, dialect = plan_of(tiny_spec, ("fp8",), "fp8", base="bf16"), "ort-emulated-bf16"
    graphs = planned_graphs(tiny_spec, plan, (dialect,))
    split = split_of(graphs, tiny_spec, plan, (dialect,))
    assert split.contract.table.dtype == "bfloat16"
    folder = save_planned(tmp_path, tiny_spec, SOURCE, plan, graphs)
    whole = ort_sample(folder, f"model.{dialect}.onnx", tiny_spec, plan)
    assert torch.equal(sampled_in_two(split, folder, tiny_spec, plan), whole)
    check_parts(graphs.lowered[dialect], split.conditioning[dialect], split.trunk[dialect])


def test_the_edge_of_the_graph_stays_in_the_compute_type(tiny_spec: ModelSpec, planned_graphs: PlannedGraphs) -> None:
    plan = PrecisionPlan(PRECISIONS["fp16"], wide={"final": frozenset({"sample"}), "txt_embed": frozenset({"txt"})})
    graph = planned_graphs(tiny_spec, plan).standard
    assert graph.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert {n.name: n.op_type for n in graph.graph.node}["blocks.0"] == "MMDiTJointBlock_fp32in"
    onnx.shape_inference.infer_shapes(graph, strict_mode=True)


def drop_quantize(function: ir.Function) -> None:
    """An input goes into the product as it is."""
    node = next(n for n in function if n.op_type == "DequantizeLinear" and n.inputs[0].producer() is not None)
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0].producer().inputs[0])


def another_scale(function: ir.Function) -> None:
    """What was divided by one layer's scale is multiplied by another's."""
    nodes = [n for n in function if n.op_type == "DequantizeLinear" and n.inputs[0].producer() is not None]
    nodes[0].replace_input_with(1, nodes[1].inputs[1])


def plain_attention(function: ir.Function) -> None:
    node = next(n for n in function if n.op_type == "MMDiTFP8Attention")
    node.op_type, node.domain = "Attention", ""


FAULTS: Mapping[str, Callable[[ir.Function], None]] = {
    "a Q/DQ is missing": drop_quantize,
    "Q and DQ of unlike scales": another_scale,
    "an attention that is not in FP8": plain_attention,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_quantized_as_planned_is_refused(
    fault: str, tiny_spec: ModelSpec, planned_graphs: PlannedGraphs
) -> None:
    plan = plan_of(tiny_spec, fp8_attention=True)
    model = in_ir(planned_graphs(tiny_spec, plan).standard)
    check_census(model, implied(tiny_spec, plan), "standard")
    FAULTS[fault](next(f for f in model.functions.values() if f.name == "MMDiTJointBlock_fp8"))
    with pytest.raises(GraphError, match="the standard graph"):
        check_census(model, implied(tiny_spec, plan), "standard")
    lowered, _ = lower(model, "trt")
    with pytest.raises(GraphError, match="the trt graph"):
        check_census(lowered, implied_lowered(tiny_spec, "trt", plan), "trt")


@pytest.mark.parametrize(
    ("path", "message"),
    [("blocks.7.img.mlp.up", "which it does not have"), ("blocks.0.img.mlp.middle", r"img\.mlp\.middle\.weight")],
)
def test_a_plan_for_another_model_is_refused(
    path: str, message: str, tiny_spec: ModelSpec, planned_graphs: PlannedGraphs
) -> None:
    plan = plan_of(tiny_spec)
    layout = planned_layout(tiny_spec, plan, {"format": "pt"})
    plain = planned_graphs(tiny_spec, PrecisionPlan(plan.precision)).standard
    other = dataclasses.replace(plan, linears={path: linear_plan("fp8", 64)})
    with pytest.raises(GraphError, match=message):
        apply_plan(in_ir(plain), other, layout, location="weights.safetensors")


def test_a_layout_of_another_plan_is_refused(tiny_spec: ModelSpec, planned_graphs: PlannedGraphs) -> None:
    plan = plan_of(tiny_spec)
    plain = planned_graphs(tiny_spec, PrecisionPlan(plan.precision)).standard
    layout = planned_layout(tiny_spec, PrecisionPlan(plan.precision), {"format": "pt"})
    with pytest.raises(ValueError, match="another plan"):
        apply_plan(in_ir(plain), plan, layout, location="weights.safetensors")


def test_names_of_quantize_nodes_are_unique_for_tensorrt(tiny_spec: ModelSpec, planned_graphs: PlannedGraphs) -> None:
    spec = dataclasses.replace(tiny_spec, depth=4)
    plan = plan_of(spec, ("fp8", "int8"), fp8_attention=True)
    graphs = planned_graphs(spec, plan, ("trt",))
    trt = graphs.of("trt")
    scopes = [trt.graph.node, *(f.node for f in trt.functions)]
    names = [n.name for nodes in scopes for n in nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    layers, blocks = sum(p.startswith("blocks.") for p in plan.linears), spec.depth
    assert len(names) == len(set(names)) == 3 * layers + 8 * blocks
    assert all(name.startswith("blocks.") for name in names)
    assert {f.name for f in trt.functions} >= {f"MMDiTJointBlock_fp8_int8_blocks_{i}" for i in range(3)}
    assert not any(node.op_type.startswith("MMDiTFP8") for nodes in scopes for node in nodes)
    again, _ = lower(in_ir(trt), "trt")
    assert sorted(f.name for f in again.functions.values()) == sorted(f.name for f in trt.functions)
