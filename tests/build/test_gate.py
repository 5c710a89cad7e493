"""The fusion gate passes engines of the model as it is, and refuses what does not fit its graph."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import onnx
import pytest

from mmdit_deploy.build.gate import check_fusion
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.families import preset
from mmdit_deploy.graph.census import OPS, implied, implied_by_call
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec

Refusal = Callable[..., str]
SavedGraph = Callable[..., tuple]
BuildLayers = Callable[..., tuple[EngineLayer, ...]]

SPECS: dict[str, dict[str, object]] = {
    "plain": {},
    "one block": {"depth": 1},
    "no QK norm": {"qk_norm": False},
    "dual attention": {"depth": 3, "dual_attention_blocks": (0, 2)},
}
ATTENTIONS = {
    "plain": {"blocks.0": 1, "blocks.1": 1},
    "one block": {"blocks.0": 1},
    "no QK norm": {"blocks.0": 1, "blocks.1": 1},
    "dual attention": {"blocks.0": 2, "blocks.1": 1, "blocks.2": 2},
}


def spec_with(spec: ModelSpec, name: str) -> ModelSpec:
    return dataclasses.replace(spec, **SPECS[name])


@pytest.fixture(scope="module")
def built(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers
) -> tuple[onnx.ModelProto, tuple[EngineLayer, ...]]:
    """The graph of two fp16 blocks and the layers of its engine."""
    graph, folder = saved_graph(tiny_spec, "fp16")
    return graph, build_layers(graph, folder)


@pytest.mark.parametrize("name", SPECS)
def test_what_the_spec_implies_by_call_is_what_it_implies(tiny_spec: ModelSpec, name: str) -> None:
    spec = spec_with(tiny_spec, name)
    total = Counter[str]()
    for counts in implied_by_call(spec).values():
        total.update(counts)
    assert dict(total) == {op: n for op, n in implied(spec).items() if op in OPS}


def test_a_segment_has_its_own_calls_only() -> None:
    spec = preset("sd3.5-medium")
    assert implied_by_call(spec, {"conditioning", "blocks.12", "blocks.13"}) == {
        "blocks.12": {"Attention": 2, "RMSNormalization": 6, "LayerNormalization": 4, "Gelu": 2, "Softmax": 0},
        "blocks.13": {"Attention": 1, "RMSNormalization": 4, "LayerNormalization": 4, "Gelu": 2, "Softmax": 0},
    }


@pytest.mark.parametrize(("precision", "name"), [*(("fp16", name) for name in SPECS), ("bf16", "plain")])
def test_every_attention_is_one_fused_kernel(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers, profiles: dict, name: str, precision: str
) -> None:
    spec = spec_with(tiny_spec, name)
    graph, folder = saved_graph(spec, precision)
    layers = build_layers(graph, folder, profiles["two"])
    found = check_fusion(graph, layers, implied_by_call(spec), fused=True, profiles=2, what="test")
    assert found == ATTENTIONS[name]
    assert sum(layer.is_fused_attention for layer in layers) == 2 * sum(found.values())


@pytest.mark.parametrize("name", ["plain", "dual attention"])
def test_fp32_attention_is_written_out(
    tiny_spec: ModelSpec,
    saved_graph: SavedGraph,
    build_layers: BuildLayers,
    profiles: dict,
    name: str,
    refusal: Refusal,
) -> None:
    spec = spec_with(tiny_spec, name)
    graph, folder = saved_graph(spec, "fp32")
    layers = build_layers(graph, folder, profiles["two"], decomposable=True)
    found = check_fusion(graph, layers, implied_by_call(spec), fused=False, profiles=2, what="test")
    assert found == dict.fromkeys(ATTENTIONS[name], 0)
    # Asked for a fused kernel, the gate says what there is instead.
    message = refusal(graph, layers, spec, profiles=2)
    assert "blocks.0: node_Attention_4 (Attention) is not one fused attention kernel; it became " in message
    assert "SubExp" in message and "(gemm)" in message and "(profile 0)" in message


def test_the_lowered_graph_passes(
    tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs], saved_graph: SavedGraph, build_layers: BuildLayers
) -> None:
    """Nodes that lowering puts into the main graph belong to no call."""
    _, folder = saved_graph(tiny_spec, "fp16")
    graph = graphs_of(tiny_spec, "fp16", dialects=("trt",)).of("trt")
    layers = build_layers(graph, folder)
    expected = implied_by_call(tiny_spec)
    assert check_fusion(graph, layers, expected, fused=True, profiles=1, what="test") == ATTENTIONS["plain"]


def test_a_segment_is_checked_on_its_own(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers, refusal: Refusal
) -> None:
    whole, folder = saved_graph(tiny_spec, "fp16")
    graph = extract_call(whole, "blocks.1")
    layers = build_layers(graph, folder)
    only = implied_by_call(tiny_spec, {"blocks.1"})
    assert check_fusion(graph, layers, only, fused=True, profiles=1, what="test") == {"blocks.1": 1}
    assert "blocks.0: the graph has no such call; its calls are blocks.1" in refusal(graph, layers, tiny_spec)


def test_allowing_tensorrt_to_write_attention_out_changes_nothing_where_it_can_fuse(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers
) -> None:
    graph, folder = saved_graph(tiny_spec, "fp16")
    layers = build_layers(graph, folder, decomposable=True)
    expected = implied_by_call(tiny_spec)
    assert check_fusion(graph, layers, expected, fused=True, profiles=1, what="test") == ATTENTIONS["plain"]


def test_the_intact_engine_passes(tiny_spec: ModelSpec, built: tuple) -> None:
    expected = implied_by_call(tiny_spec)
    assert check_fusion(*built, expected, fused=True, profiles=1, what="test") == ATTENTIONS["plain"]


def test_a_fused_attention_is_not_written_out(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    message = refusal(*built, tiny_spec, fused=False)
    assert "blocks.1: node_Attention_4 (Attention) is not written out; it became " in message
    assert "_gemm_mha_v2_myl0_" in message


def test_an_engine_without_kernels_is_refused(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    message = refusal(built[0], (), tiny_spec)
    assert "kernels for the profiles [0] expected; the engine has some for []" in message


def test_an_engine_lacks_a_profile(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    message = refusal(*built, tiny_spec, profiles=2)
    assert "kernels for the profiles [0, 1] expected; the engine has some for [0]" in message


def test_a_miss_in_one_profile_is_enough(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers, profiles: dict, refusal: Refusal
) -> None:
    graph, folder = saved_graph(tiny_spec, "fp16")
    layers = build_layers(graph, folder, profiles["two"])
    missed = ("_gemm_mha_v2_myl1_", "blocks.1")
    left = [layer for layer in layers if not (layer.name.startswith(missed[0]) and layer.sources[0][1] == missed[1])]
    assert len(left) == len(layers) - 1
    message = refusal(graph, left, tiny_spec, profiles=2)
    assert "blocks.1: node_Attention_4 (Attention) is not one fused attention kernel" in message
    assert "(profile 1)" in message and "(profile 0)" not in message and "blocks.0" not in message


def test_kernels_of_another_call_are_not_this_ones(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    graph, layers = built
    renamed = [
        dataclasses.replace(
            layer, sources=tuple((node, "tail" if call == "blocks.1" else call) for node, call in layer.sources)
        )
        for layer in layers
    ]
    message = refusal(graph, renamed, tiny_spec)
    assert "blocks.1: node_Attention_4 (Attention) is not one fused attention kernel; it became nothing" in message
    assert "a fused kernel is made of one Attention, this one of tail: node_Attention_4" in message
    assert "blocks.1: node_rms_norm (RMSNormalization) is in no kernel" in message
    assert "and 1 more" in message  # eight of nine: attention, its kernel, four QK norms and three LayerNorms


def test_two_attentions_in_one_kernel_are_refused(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    graph, layers = built
    both = [
        dataclasses.replace(layer, sources=(("node_Attention_4", "blocks.0"), ("node_Attention_4", "blocks.1")))
        for layer in layers
        if layer.is_fused_attention
    ][:1]
    left = [layer for layer in layers if not layer.is_fused_attention]
    message = refusal(graph, [*left, *both], tiny_spec)
    assert "this one of blocks.0: node_Attention_4, blocks.1: node_Attention_4" in message


def test_a_norm_without_its_modulation_is_refused(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    graph, layers = built
    norm = ("node_layer_norm_2", "blocks.0")
    apart = [dataclasses.replace(layer, sources=(norm,)) if norm in layer.sources else layer for layer in layers]
    message = refusal(graph, apart, tiny_spec)
    assert "blocks.0: node_layer_norm_2 (LayerNormalization) is not fused with node_MMDiTModulate_" in message
    assert "; it became __myl_" in message


def test_a_softmax_beside_the_fused_kernel_is_refused(tiny_spec: ModelSpec, built: tuple, refusal: Refusal) -> None:
    """By what the attention became, and in a block also without one: a softmax spelled with Exp has no Softmax node."""
    graph, layers = built
    attention = ("node_Attention_4", "blocks.1")
    for source, says in (
        (attention, "blocks.1: node_Attention_4 (Attention) is not one fused attention kernel; it became "),
        (("node_exp", "blocks.1"), "blocks.1: __myl_MaxrSubExpSum_myl0_99 is a softmax on its own, made of "),
    ):
        extra = EngineLayer("__myl_MaxrSubExpSum_myl0_99", "kgen", 0, (source,), (), (), "")
        assert says in refusal(graph, [*layers, extra], tiny_spec)
    product = EngineLayer("__fc65568_myl0_99", "gemm", 0, (attention,), (), (), "")
    assert "__fc65568_myl0_99 (gemm)" in refusal(graph, [*layers, product], tiny_spec)
    # A projection that also scales Q for the attention is none of its products.
    both = (("node_linear", "blocks.1"), attention)
    scaled = EngineLayer("__myl_FcAddMul_myl0_99", "runtime_fusion", 0, both, (), (), "")
    check_fusion(graph, (*layers, scaled), implied_by_call(tiny_spec), fused=True, profiles=1, what="test")
