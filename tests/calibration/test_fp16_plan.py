"""The automatic fp16 plan: models that fp16 cannot hold, what they keep in fp32, and what ONNX Runtime makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from mmdit_deploy.calibration.fp16_emulation import Bound, error_of, worst
from mmdit_deploy.calibration.fp16_plan import Fp16Plan
from mmdit_deploy.calibration.fp16_ranges import factor_of, ranges_of, too_large
from mmdit_deploy.calibration.fp16_search import SHARE, plan_fp16
from mmdit_deploy.calibration.fp16_variants import rounded_up
from mmdit_deploy.calibration.graph_values import GraphValues, is_computed
from mmdit_deploy.calibration.observe import Observer
from mmdit_deploy.calibration.value_labels import labels
from mmdit_deploy.checkpoint import write_safetensors
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.eager.program import Program
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import MMDiT
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.weights import planned_layout, stream_planned
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.records import Case
from mmdit_deploy.verify.tolerances import TOLERANCES

FP16 = precision("fp16")
TOLERANCE = Bound(TOLERANCES["fp16"].min_cosine, TOLERANCES["fp16"].max_rel_l2)
CASES = (Case(2, 5, 4, 7, timestep=900.0), Case(1, 3, 6, 4, timestep=100.0))
RANGES = {"batch": Range(1, 2, 4), "img_tokens": Range(2, 16, 64), "txt_tokens": Range(2, 8, 64)}
BLOCK = r"transformer_blocks\.%s\."


class Scaled(RandomWeights):
    """Random weights, some of which are changed: what matches a key, times a factor, plus a number."""

    def __init__(self, changes: Mapping[str, tuple[float, float]]):
        super().__init__(0)
        self._changes = changes

    def part(self, part: Part) -> Tensor:
        tensor = super().part(part)
        for key, (factor, more) in self._changes.items():
            if re.fullmatch(key, part.key):
                tensor = tensor * factor + more
        return tensor


# Of four blocks, late ones leave fp16's range; the final norm brings the model back into it.
HEALTHY: dict[str, tuple[float, float]] = {}
STREAM = {BLOCK % "[23]" + r"ff\.net\.2\.weight": (2e5, 0.0)}
GATED = {  # a product of 2e4, and gates of three
    BLOCK % "2" + r"ff\.net\.2\.weight": (2.2e3, 0.0),
    BLOCK % "2" + r"norm1\.linear\.bias": (1.0, 3.0),
}
VALUES = {
    BLOCK % "1" + r"attn\.to_v\.weight": (1e5, 0.0),
    BLOCK % "1" + r"attn\.to_out\.0\.weight": (1e-2, 0.0),
    BLOCK % "1" + r"attn\.to_add_out\.weight": (1e-2, 0.0),
}


@dataclasses.dataclass
class Planner:
    """Plans models of one spec, and runs their graphs."""

    spec: ModelSpec
    programs: Mapping[str, Program]
    functions: Mapping[str, ir.Function]
    planned: Callable[..., Graphs]
    eager: Callable[..., MMDiT]
    folder: Path

    @property
    def contract(self) -> Contract:
        return Contract.of(self.spec, FP16, RANGES)

    @property
    def samples(self) -> list[dict[str, Tensor]]:
        return [case_inputs(case, self.contract, self.spec) for case in CASES]

    def ranges(self, source: RandomWeights) -> dict[str, dict[str, float]]:
        observer = Observer(self.spec, source, torch.float16, programs=self.programs)
        observer.evaluate(self.samples)
        return ranges_of(observer.statistics)

    def plan(
        self, source: RandomWeights, bound: Bound = TOLERANCE, samples: Sequence[Mapping[str, Tensor]] = ()
    ) -> Fp16Plan:
        return plan_fp16(
            self.spec,
            source,
            self.ranges(source),
            samples or self.samples,
            bound,
            programs=self.programs,
            functions=self.functions,
        )

    def build(self, wide: Mapping[str, frozenset[str]], dialects: Sequence[str] = ("ort",)) -> Graphs:
        return self.planned(self.spec, PrecisionPlan(FP16, wide=wide), dialects)

    def run(self, source: RandomWeights, wide: Mapping[str, frozenset[str]], dialect: str = "ort") -> list[Tensor]:
        """What ONNX Runtime makes of the samples."""
        plan, folder = PrecisionPlan(FP16, wide=wide), self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        onnx.save(self.build(wide, (dialect,)).of(dialect), folder / "model.onnx")
        layout = planned_layout(self.spec, plan, {"format": "pt"})
        write_safetensors(folder / "weights.safetensors", layout, stream_planned(self.spec, source, plan))
        session = open_session(folder / "model.onnx", "ort-cpu")
        made = []
        for case, inputs in zip(CASES, self.samples, strict=True):
            sizes = {"batch": case.batch, "img_tokens": case.img_tokens, "txt_tokens": case.txt_tokens}
            outputs = [(t.name, torch.float16, t.shape(sizes)) for t in self.contract.outputs]
            made.append(run_session(session, inputs, outputs)["sample"].float())
        return made

    def expected(self, source: RandomWeights) -> list[Tensor]:
        model = self.eager(self.spec, source)
        with torch.inference_mode():
            return [
                model(**{n: t.float() if t.is_floating_point() else t for n, t in inputs.items()})
                for inputs in self.samples
            ]


@pytest.fixture(scope="module")
def planner(
    tiny_spec: ModelSpec,
    programs_for: Callable[..., Mapping[str, Program]],
    fused_for: Callable[..., Mapping[str, ir.Function]],
    planned_graphs: Callable[..., Graphs],
    eager_model: Callable[..., MMDiT],
    tmp_path_factory: pytest.TempPathFactory,
) -> Planner:
    spec = dataclasses.replace(tiny_spec, name="tiny-4", depth=4)
    programs, functions = programs_for(spec, torch.float16), fused_for(spec)
    return Planner(spec, programs, functions, planned_graphs, eager_model, tmp_path_factory.mktemp("planned"))


@pytest.mark.parametrize("changes", [STREAM, GATED, VALUES], ids=["stream", "gate × product", "V"])
def test_pure_fp16_is_not_finite_and_the_plan_is_within_tolerance(
    changes: Mapping[str, tuple[float, float]], planner: Planner
) -> None:
    source = Scaled(changes)
    plan, expected = planner.plan(source), planner.expected(source)
    assert not all(t.isfinite().all() for t in planner.run(source, {}))
    assert all(error.after.within(plan.bound) for error in plan.errors.values()) and not plan.out_of_bound
    dialect = "ort-emulated-bf16" if plan.bf16_attentions else "ort"
    received = planner.run(source, plan.wide, dialect)
    assert worst([error_of(a, b) for a, b in zip(received, expected, strict=True)]).within(TOLERANCE)
    assert "blocks.0" not in plan.wide and {t.why for t in plan.kept} <= {"range", "neighbour"}


def test_a_healthy_model_has_no_islands_and_its_graph_is_that_of_pure(
    planner: Planner, graphs_of: Callable[..., Graphs]
) -> None:
    plan = planner.plan(RandomWeights(0))
    assert not plan.wide and not plan.kept and not plan.out_of_bound
    pure, auto = graphs_of(planner.spec, "fp16", ("ort",)), planner.build(plan.wide)
    for dialect in ("standard", "ort"):
        assert auto.of(dialect).SerializeToString(deterministic=True) == pure.of(dialect).SerializeToString(
            deterministic=True
        )


def test_only_the_blocks_that_need_it_keep_anything_and_only_what_they_need(planner: Planner) -> None:
    plan = planner.plan(Scaled(STREAM))
    assert plan.wide == {
        "blocks.2": {"linear_4", "img_out"},
        "blocks.3": {"hidden_states", "add_210", "linear_4", "img_out"},
        "final": {"hidden_states"},
    }
    said = {(t.call, t.label) for t in plan.kept if t.why == "range"}
    assert ("blocks.2", "product of img.mlp.down") in said
    assert ("blocks.3", "residual stream of the image, after img.attn_out") in said
    assert ("final", "residual stream, entering") in said
    assert all(t.amax * plan.headroom > 65504 for t in plan.kept if t.why == "range")
    gated = planner.plan(Scaled(GATED)).wide
    assert "linear_4" not in gated["blocks.2"]  # gate · product overflows, the product itself does not


def test_what_leaves_a_block_in_fp32_is_fp32_for_all_that_read_it(planner: Planner) -> None:
    graph = planner.build(planner.plan(Scaled(STREAM)).wide).standard.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    assert types["blocks.2.img"] == types["blocks.3.img"] == onnx.TensorProto.FLOAT
    assert types["blocks.1.img"] == types["blocks.2.txt"] == types["sample"] == onnx.TensorProto.FLOAT16


def test_attention_is_bf16_where_v_overflows_and_nowhere_fp32(planner: Planner) -> None:
    plan = planner.plan(Scaled(VALUES))
    assert plan.bf16_attentions == ("blocks.1",)
    model = ir.from_proto(planner.build(plan.wide, ()).standard)
    types = [
        {v.dtype for v in node.inputs if v is not None}
        for function in model.functions.values()
        for node in function
        if node.op_type == "Attention"
    ]
    assert sorted(types, key=str) == [{ir.DataType.BFLOAT16}, {ir.DataType.FLOAT16}, {ir.DataType.FLOAT16}]


def test_what_rounds_too_much_is_kept_until_the_call_is_within_the_bound(planner: Planner) -> None:
    pure = planner.plan(RandomWeights(0))
    errors = {call: error.before.rel_l2 for call, error in pure.errors.items()}
    strict = Bound(0.9, 0.9 * errors["blocks.1"] / SHARE)
    plan = planner.plan(RandomWeights(0), strict)
    assert {t.why for t in plan.kept} <= {"error", "neighbour", "shared"} and "blocks.1" in plan.wide
    assert plan.errors["blocks.1"].after.within(plan.bound) and not plan.errors["blocks.1"].before.within(plan.bound)
    assert all(e.after.rel_l2 <= e.before.rel_l2 for e in plan.errors.values())
    within = [call for call, error in plan.errors.items() if error.before.within(plan.bound)]
    own = {t.call for t in plan.kept if t.why == "error" and "stream" not in t.label}
    assert within and not own & set(within)


def test_what_fp16_rounds_to_nothing_counts_as_error(planner: Planner) -> None:
    source = Scaled({r"context_embedder\.weight": (1e-3, 0.0), r"context_embedder\.bias": (0.0, 0.0)})
    faint = [{**sample, "encoder_hidden_states": sample["encoder_hidden_states"] * 1e-3} for sample in planner.samples]
    plan = planner.plan(source, samples=faint)  # the embedded text is about 1e-6, where fp16 has steps of 6e-8
    assert plan.errors["txt_embed"].before.rel_l2 > 0.01 > plan.errors["txt_embed"].after.rel_l2
    assert plan.wide["txt_embed"] == {"txt"} and "encoder_hidden_states" in plan.wide["blocks.0"]


def test_what_calibration_did_not_see_is_kept_where_the_samples_overflow(planner: Planner) -> None:
    source = Scaled(STREAM)
    plan = plan_fp16(
        planner.spec, source, {}, planner.samples, TOLERANCE, programs=planner.programs, functions=planner.functions
    )
    assert "linear_4" in plan.wide["blocks.2"] and not plan.out_of_bound


def test_a_product_within_a_node_is_kept_by_reading_its_factor_in_fp32(planner: Planner) -> None:
    name = "MMDiTJointBlock"
    places = GraphValues(planner.programs[name], planner.functions[name])
    beyond = too_large(places, {"mul_145": 5e4, "mul_157": 5e4, "add_226": 3e4, "linear_2": 100.0})
    assert not beyond.values
    assert sorted(beyond.factors.values()) == ["split_split_2", "split_split_4"]  # a gate, and a scale
    assert all(factor_of(node) == factor for node, factor in beyond.factors.items())


def test_every_operator_in_fp16_has_its_place_in_the_graph(planner: Planner) -> None:
    for name, program in planner.programs.items():
        places = GraphValues(program, planner.functions[name])
        for operator in program.module.graph.nodes:
            placed = any(operator.name in found for found in (places.values, places.inside, places.attentions))
            computes = "transpose" not in operator.name and "scalar_tensor" not in operator.name
            if operator.op == "call_function" and is_computed(operator, torch.float16) and computes:
                assert placed or operator.name in ("clone", "view"), (name, operator.name)


def test_plans_that_differ_a_little_share_a_variant_and_what_enters_and_leaves_stays() -> None:
    wide = {
        "a": frozenset({"in", "x"}),
        "b": frozenset({"in", "x", "y"}),
        "c": frozenset({"in"}),
        "d": frozenset({"x"}),
        "e": frozenset({"in", *"pqrst"}),
    }
    made = rounded_up(wide, dict.fromkeys(wide, "f"), {"f": {"in", "out"}})
    assert made == wide | {"a": wide["b"]}


def test_the_record_is_small_and_says_of_each_tensor_its_range_its_type_and_why(planner: Planner) -> None:
    plan = planner.plan(Scaled(STREAM))
    record = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    block = record["calls"]["blocks.3"]
    assert block["amax"]["linear_4"] > 1e5 and block["fp32"]["linear_4"] == "range"
    assert block["fp32"]["layer_norm"] == "neighbour" and "linear_3" not in block["fp32"]
    assert record["labels"][block["function"]]["linear_4"] == "product of img.mlp.down"
    size = {name: len(json.dumps(call)) for name, call in record["calls"].items()}
    # 24 joint blocks and their modulations
    assert len(json.dumps(record["labels"])) + 24 * (size["blocks.2"] + 2 * size["modulations.2.img"]) < 200_000
    assert "blocks.2: product of img.mlp.down: fp32" in plan.text()


def test_labels_say_what_values_are(planner: Planner) -> None:
    words = labels(planner.functions["MMDiTJointBlock"])
    assert words["cat_2"] == "V of all tokens" and words["cat"] == "Q of all tokens"
    assert words["split_split_2"] == "gate of img.attn_out"
    assert words["split_split_4"] == "scale for img.mlp.up"
    assert words["add_61"] == "modulated norm, input of img.qkv.proj"
    assert words["layer_norm"] == "norm of the residual stream of the image"
    assert words["rms_norm"] == "norm img.qkv.norm_q"
    assert words["gelu"] == "gelu of product of img.mlp.up"
    assert words["txt_out"] == "residual stream of the text, leaving"


@pytest.fixture(scope="module")
def flux(
    tiny_families: Mapping[str, ModelSpec],
    programs_for: Callable[..., Mapping[str, Program]],
    fused_for: Callable[..., Mapping[str, ir.Function]],
    planned_graphs: Callable[..., Graphs],
    eager_model: Callable[..., MMDiT],
    tmp_path_factory: pytest.TempPathFactory,
) -> Planner:
    spec = tiny_families["flux1"]
    programs, functions = programs_for(spec, torch.float16), fused_for(spec)
    return Planner(spec, programs, functions, planned_graphs, eager_model, tmp_path_factory.mktemp("flux"))


def test_fluxs_clip_goes_where_it_would_cut_and_stays_elsewhere(flux: Planner) -> None:
    source = Scaled({r"single_transformer_blocks\.1\.(proj_out\.weight|norm\.linear\.bias)": (3e4, 0.0)})
    plan, expected = flux.plan(source), flux.expected(source)
    graph = flux.build(plan.wide, ()).standard
    called = {node.name: node.op_type for node in graph.graph.node}
    clips = {f.name: sum(node.op_type == "Clip" for node in f.node) for f in graph.functions}
    assert {call: clips[called[call]] for call in ("blocks.0", "single_blocks.0", "single_blocks.1")} == {
        "blocks.0": 2,
        "single_blocks.0": 1,
        "single_blocks.1": 0,
    }
    cut, kept = flux.run(source, {}), flux.run(source, plan.wide)
    assert not worst([error_of(a, b) for a, b in zip(cut, expected, strict=True)]).within(TOLERANCE)
    assert worst([error_of(a, b) for a, b in zip(kept, expected, strict=True)]).within(TOLERANCE)
