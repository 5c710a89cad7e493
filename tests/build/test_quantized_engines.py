"""Quantized engines, built for real: every planned layer is a product of quantized numbers, or there is no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from mmdit_deploy.build import EngineRecord, parse_target
from mmdit_deploy.build.attention_sizes import check_profiles
from mmdit_deploy.build.engines import build_target
from mmdit_deploy.build.gate import check_fusion
from mmdit_deploy.build.layers import ENGINE, EngineLayer
from mmdit_deploy.build.layers_file import FILE_NAME, read_layers
from mmdit_deploy.build.quantized import check_quantization, quantized_products
from mmdit_deploy.build.traffic import traffic_of
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract, Profile, Range
from mmdit_deploy.errors import GraphError, UsageError
from mmdit_deploy.graph.census import implied_by_call
from mmdit_deploy.graph.extract import extract_segment
from mmdit_deploy.graph.lower import DIALECTS, lower
from mmdit_deploy.graph.lower.batched_modulation import batched_modulation
from mmdit_deploy.graph.onnx_file import to_ir
from mmdit_deploy.graph.passes import run
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import calls
from mmdit_deploy.precision import SCHEMES, AttentionScales, LinearPlan, PrecisionPlan, linears, role_of
from mmdit_deploy.spec import ModelSpec, precision

pytestmark = pytest.mark.usefixtures("tensorrt_rtx")

Build = Callable[..., "Built"]
BLOCKS = ("attention", "mlp")
# 32 tokens in all, the fewest that attention in FP8 is fused for
RANGES: Profile = {"batch": Range(1, 2, 4), "img_tokens": Range(30, 64, 256), "txt_tokens": Range(2, 16, 64)}


@dataclass(frozen=True)
class Built:
    """An engine as an export builds it, and what it was built from."""

    spec: ModelSpec
    plan: PrecisionPlan
    record: EngineRecord
    layers: tuple[EngineLayer, ...]
    graph: onnx.ModelProto  # lowered
    standard: onnx.ModelProto
    folder: Path
    log: tuple[str, ...]

    @property
    def calls(self) -> list[str]:
        return [call.path for call in calls(self.spec)]

    def check(self, layers: Sequence[EngineLayer], plan: PrecisionPlan | None = None) -> Mapping[str, Any]:
        plan = plan or self.plan
        fp8 = {call: len(scales) for call, scales in plan.attentions.items()}
        expected = implied_by_call(self.spec)
        check_fusion(self.graph, layers, expected, fused=True, profiles=1, what="test", fp8=fp8)
        return check_quantization(self.graph, layers, plan, self.calls, what="test")

    def refusal(self, layers: Sequence[EngineLayer], plan: PrecisionPlan | None = None) -> str:
        with pytest.raises(GraphError) as caught:
            self.check(layers, plan)
        assert caught.value.exit_status == 3 and caught.value.fix
        return str(caught.value)


def plan_of(spec: ModelSpec, scheme: str, modulation: str | None = None, *, attention: bool = False) -> PrecisionPlan:
    schemes = {**dict.fromkeys(BLOCKS, scheme), **({"modulation": modulation} if modulation else {})}
    planned = {}
    for path in linears(spec):
        if (name := schemes.get(role_of(path))) is not None:
            amax = 8.0 if SCHEMES[name].activations in ("tensor", "block") else None
            planned[path] = LinearPlan(SCHEMES[name], amax)
    in_fp8 = {block: (AttentionScales(5.0, 6.0, 3.0),) for block in spec.block_names} if attention else {}
    return PrecisionPlan(precision(scheme.partition("-")[0]), planned, in_fp8)


@pytest.fixture(scope="module")
def build(
    tiny_spec: ModelSpec,
    planned_graphs: Callable[..., Graphs],
    save_planned: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Build:
    """Builds a planned engine through the gate: ``build(plan, "rtx:sm89")``."""

    def made(plan: PrecisionPlan, name: str, ranges: Profile = RANGES) -> Built:
        graphs = planned_graphs(tiny_spec, plan, ("trt",))
        folder = save_planned(tmp_path_factory.mktemp("planned"), tiny_spec, RandomWeights(0), plan, graphs)
        whole, target = [[call.path for call in calls(tiny_spec)]], parse_target(name)
        contract = Contract.of(tiny_spec, plan.precision, ranges)
        log: list[str] = []
        build_target(target, tiny_spec, plan.precision, contract, graphs.standard, folder, whole, log.append, plan=plan)
        record, (file,) = read_layers(folder / target.folder / FILE_NAME)
        return Built(tiny_spec, plan, record, file.layers, graphs.of("trt"), graphs.standard, folder, tuple(log))

    return made


@pytest.fixture(scope="module")
def fp8(build: Build, tiny_spec: ModelSpec) -> Built:
    """FP8 with its attention and, by weight only, the modulations, for SM89 and SM120."""
    return build(plan_of(tiny_spec, "fp8", "fp8-weights", attention=True), "rtx:sm89+sm120")


def test_fp8_builds_for_sm89_and_sm120_with_everything_fused(fp8: Built) -> None:
    """Eight layers of the first block, and five of the last, whose text ends; one product of all modulations."""
    products = fp8.record.segments[0].quantized_products
    assert products == {"blocks.0": {"fp8": 8}, "blocks.1": {"fp8": 5}, ENGINE: {"fp8-weights": 1}}
    assert fp8.record.fp8_attentions == fp8.record.fused_attentions == {"blocks.0": 1, "blocks.1": 1}
    fused = "2 of 2 attentions fused, 2 of them in FP8, quantized products: 13 fp8 and 1 fp8-weights"
    assert fused in fp8.log[-1]
    attentions = [layer for layer in fp8.layers if layer.is_fused_attention]
    assert [[tensor.dtype for tensor in layer.inputs] for layer in attentions] == [["FP8"] * 3] * 2
    assert fp8.check(fp8.layers) == products


def test_quantized_weights_are_few_bytes_in_the_engine(fp8: Built) -> None:
    product = next(p for p in quantized_products(fp8.graph) if p.linear == "blocks.0.img.mlp.up")
    (kernel,) = (layer for layer in fp8.layers if product.product in layer.sources and layer.is_product)
    width = fp8.spec.width
    assert 4 * width**2 <= traffic_of([kernel]).weights <= 4 * width**2 + 100


def test_fp4_builds_for_sm120(build: Build, tiny_spec: ModelSpec) -> None:
    built = build(plan_of(tiny_spec, "fp4", "fp8-weights"), "rtx:sm120")
    products = built.record.segments[0].quantized_products
    assert products == {"blocks.0": {"fp4": 8}, "blocks.1": {"fp4": 5}, ENGINE: {"fp8-weights": 1}}
    assert built.record.fused_attentions == {"blocks.0": 1, "blocks.1": 1} and not built.record.fp8_attentions


def test_modulations_apart_fall_back_and_are_refused(fp8: Built, build_layers: Callable[..., Any]) -> None:
    """Planted for real: with a product for each, TensorRT expands their weights in a kernel of its own."""
    model = to_ir(fp8.standard, fp8.folder)
    run(model, [step for step in DIALECTS["trt"] if step is not batched_modulation])
    graph = ir.to_proto(model)
    layers = build_layers(graph, fp8.folder, (RANGES,))
    apart = dataclasses.replace(fp8, graph=graph)
    message = apart.refusal(layers)
    assert "modulations.0.img: node_linear (fp8-weights) fell back: " in message and "expands its weights" in message


def test_attention_of_too_few_tokens_falls_back_and_is_refused(
    build: Build, tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted for real: one token less in the minimum. It is refused before the build; here the gate is to find it."""
    plan = plan_of(tiny_spec, "fp8", attention=True)
    few = {**RANGES, "img_tokens": Range(29, 64, 256)}
    with pytest.raises(UsageError, match="attention in FP8 from 32 image and text tokens together on") as caught:
        build(plan, "rtx:sm89", few)
    assert caught.value.exit_status == 2 and "--img-tokens from 30" in str(caught.value.fix)
    monkeypatch.setattr("mmdit_deploy.build.engines.check_profiles", lambda *_: None)
    with pytest.raises(GraphError) as gate:
        build(plan, "rtx:sm89", few)
    assert "blocks.0: node_Attention_4/softmax (Attention) is not one fused attention kernel" in str(gate.value)


def test_a_second_attention_has_image_tokens_alone(tiny_spec: ModelSpec) -> None:
    spec = dataclasses.replace(tiny_spec, depth=3, dual_attention_blocks=(0,))
    scales = AttentionScales(1.0, 1.0, 1.0)
    plan = PrecisionPlan(precision("fp8"), attentions={"blocks.0": (scales, scales), "blocks.1": (scales,)})
    with pytest.raises(UsageError, match="32 image tokens alone") as caught:
        check_profiles(spec, plan, [RANGES])
    assert "--img-tokens from 32" in str(caught.value.fix)
    check_profiles(spec, plan, [{**RANGES, "img_tokens": Range(32, 32, 32)}])
    check_profiles(spec, PrecisionPlan(precision("fp8"), attentions={"blocks.1": (scales,)}), [RANGES])
    check_profiles(spec, PrecisionPlan(precision("fp8")), [{**RANGES, "img_tokens": Range(1, 1, 1)}])


def retyped(tensors: Sequence[Any], dtype: str) -> tuple[Any, ...]:
    return tuple(dataclasses.replace(t, dtype=dtype) if t.dtype == "FP8" else t for t in tensors)


def in_half(layer: EngineLayer, what: str) -> EngineLayer:
    return dataclasses.replace(layer, **{what: retyped(getattr(layer, what) or (), "Half")})


MLP_UP = ("node_MatMul_83", "blocks.0")


def input_in_half(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    return [in_half(layer, "inputs") if MLP_UP in layer.sources and layer.is_product else layer for layer in layers]


def weights_in_half(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    return [in_half(layer, "constants") if MLP_UP in layer.sources and layer.is_product else layer for layer in layers]


def weights_expanded(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    product = next(layer for layer in layers if MLP_UP in layer.sources and layer.is_product)
    wide = tuple(dataclasses.replace(t, dtype="Half") for t in product.outputs)
    dequantize = ("blocks.0/img.mlp.up.weight.dequantize", "blocks.0")
    expanding = dataclasses.replace(
        product, name="__myl_CastMul_myl0_99", type="kgen", sources=(dequantize,), outputs=wide
    )
    return [*layers, expanding]


def product_gone(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    return [layer for layer in layers if not (MLP_UP in layer.sources and layer.is_product)]


def attention_in_half(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    return [
        in_half(layer, "inputs") if layer.is_fused_attention and layer.sources[0][1] == "blocks.1" else layer
        for layer in layers
    ]


FALLEN_BACK: dict[str, tuple[Callable[[Sequence[EngineLayer]], list[EngineLayer]], str]] = {
    "input": (input_in_half, "blocks.0: node_MatMul_83 (fp8) fell back: node_MatMul_83_"),
    "weights": (weights_in_half, "has Half, Float for weights, and no E4M3 or FP8"),
    "weights of another kernel": (weights_expanded, "fell back: __myl_CastMul_myl0_99 expands its weights"),
    "product": (product_gone, "blocks.0: node_MatMul_83 (fp8) is in no product of the engine"),
    "attention": (attention_in_half, "blocks.1: node_Attention_4/softmax (Attention) is to read Q, K and V in FP8"),
}


@pytest.mark.parametrize("what", FALLEN_BACK)
def test_what_fell_back_is_an_error_that_names_block_and_node(fp8: Built, what: str) -> None:
    change, says = FALLEN_BACK[what]
    message = fp8.refusal(change(fp8.layers))
    assert says in message and message.count("fell back") <= 1


def test_an_engine_of_another_plan_is_refused(fp8: Built) -> None:
    linear = "blocks.0.img.mlp.up"
    fewer = {path: plan for path, plan in fp8.plan.linears.items() if path != linear}
    by_token = {**fewer, linear: LinearPlan(SCHEMES["fp8-token"])}
    more = {**fp8.plan.linears, "final.proj": LinearPlan(SCHEMES["fp8"], 1.0)}
    joined = {path: plan for path, plan in fp8.plan.linears.items() if path != "modulations.0.img.proj"}
    for linears_, says in (
        (fewer, f"{linear} is fp8 in the graph, and not quantized in the plan"),
        (by_token, f"{linear} is fp8 in the graph, and fp8-token in the plan"),
        (more, "not quantized in the graph: "),
        (joined, "joined to one product there: 5 by fp8-weights"),
    ):
        assert says in fp8.refusal(fp8.layers, dataclasses.replace(fp8.plan, linears=linears_))
    without = dataclasses.replace(fp8.plan, attentions={"blocks.0": fp8.plan.attentions["blocks.0"]})
    assert "blocks.1: 0 attentions planned in FP8, 1 in the graph" in fp8.refusal(fp8.layers, without)


def test_a_segment_is_checked_for_its_own_layers(fp8: Built) -> None:
    segment = to_ir(extract_segment(fp8.standard, ["blocks.1"], "tail"), fp8.folder)
    graph = ir.to_proto(lower(segment, "trt")[0])
    found = check_quantization(graph, fp8.layers, fp8.plan, ["blocks.1"], what="test")
    assert found == {"blocks.1": {"fp8": 5}}
    with pytest.raises(GraphError, match=r"not quantized in the graph: blocks\.0\.img\.qkv\.proj, "):
        check_quantization(graph, fp8.layers, fp8.plan, ["blocks.0", "blocks.1"], what="test")
