"""The fusion gate passes engines of the model as it is, and refuses those of a graph that was broken on purpose."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdit_deploy.build.gate import check_fusion
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.census import implied, implied_by_call
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec, preset

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


def refusal(graph: onnx.ModelProto, layers: Iterable[EngineLayer], spec: ModelSpec, **options: object) -> str:
    given = {"fused": True, "profiles": 1, "what": "engines/rtx-sm89", **options}
    with pytest.raises(GraphError) as caught:
        check_fusion(graph, tuple(layers), implied_by_call(spec), **given)
    assert caught.value.exit_status == 3
    return str(caught.value)


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
    assert dict(total) == implied(spec)


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
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers, profiles: dict, name: str
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
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers
) -> None:
    whole, folder = saved_graph(tiny_spec, "fp16")
    graph = extract_call(whole, "blocks.1")
    layers = build_layers(graph, folder)
    only = implied_by_call(tiny_spec, {"blocks.1"})
    assert check_fusion(graph, layers, only, fused=True, profiles=1, what="test") == {"blocks.1": 1}
    assert "blocks.0: the graph has no such call; its calls are blocks.1" in refusal(graph, layers, tiny_spec)


# --- graphs broken on purpose


def body(graph: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    return next(f for f in graph.functions if f.name == name)


def nodes(function: onnx.FunctionProto, op: str) -> list[onnx.NodeProto]:
    return [n for n in function.node if n.op_type == op]


def put(function: onnx.FunctionProto, old: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    """Replace a node; copies of it may be among the new ones."""
    at = next(i for i, n in enumerate(function.node) if n.name == old.name)
    after = [*function.node][at + 1 :]
    del function.node[at:]
    function.node.extend([*new, *after])


def bypass(function: onnx.FunctionProto, node: onnx.NodeProto, value: str) -> None:
    """Take a node out; what read its output reads a value before it."""
    put(function, node, helper.make_node("Identity", [value], [node.output[0]], name=f"{node.name}_gone"))


def constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], name=f"{name}_constant", value=numpy_helper.from_array(value))


def write_out(function: onnx.FunctionProto, *between: str) -> None:
    """Attention as Q·Kᵀ, some ops, Softmax and the product with V; two heads of 32."""
    (attention,) = nodes(function, "Attention")
    q, k, v = attention.input

    def heads(value: str, perm: list[int]) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Reshape", [value, "heads"], [f"{value}_heads"], name=f"reshape_{value}"),
            helper.make_node("Transpose", [f"{value}_heads"], [f"{value}_T"], name=f"transpose_{value}", perm=perm),
        ]

    chain, value = [], "scores"
    for op in between:
        chain.append(helper.make_node(op, [value], [f"{value}_{op}"], name=f"scores_{op}"))
        value = f"{value}_{op}"
    put(
        function,
        attention,
        constant("heads", np.array([0, 0, 2, 32], np.int64)),
        constant("together", np.array([0, 0, 64], np.int64)),
        constant("scale", np.array(32**-0.5, np.float16)),
        *heads(q, [0, 2, 1, 3]),
        *heads(k, [0, 2, 3, 1]),
        *heads(v, [0, 2, 1, 3]),
        helper.make_node("Mul", [f"{q}_T", "scale"], ["q_scaled"], name="scale_q"),
        helper.make_node("MatMul", ["q_scaled", f"{k}_T"], ["scores"], name="scores"),
        *chain,
        helper.make_node("Softmax", [value], ["weights"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["weights", f"{v}_T"], ["attended"], name="attend"),
        helper.make_node("Transpose", ["attended"], ["attended_T"], name="transpose_out", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["attended_T", "together"], [attention.output[0]], name="reshape_out"),
    )


def scores_are_an_output(graph: onnx.ModelProto) -> None:
    last = body(graph, "MMDiTLastJointBlock")
    write_out(last)
    last.output.append("scores")
    next(n for n in graph.graph.node if n.name == "blocks.1").output.append("blocks.1.scores")
    shape = ["batch", 2, "queries", "keys"]
    graph.graph.output.append(helper.make_tensor_value_info("blocks.1.scores", TensorProto.FLOAT16, shape))


def scores_are_capped(graph: onnx.ModelProto) -> None:
    write_out(body(graph, "MMDiTLastJointBlock"), "Tanh")


def attention_is_written_out(graph: onnx.ModelProto) -> None:
    write_out(body(graph, "MMDiTLastJointBlock"))


def cast(value: str, made: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [value], [made], name=f"cast_{made}", to=to)


def attention_in_fp32(graph: onnx.ModelProto) -> None:
    """Q, K and V are scaled in fp32, and attend so. Casts alone are moved behind the attention, which then fuses."""
    last = body(graph, "MMDiTLastJointBlock")
    (attention,) = nodes(last, "Attention")
    before = [constant("factor", np.array(1.5, np.float32))]
    for value in attention.input:
        before.append(cast(value, f"{value}_fp32", TensorProto.FLOAT))
        before.append(helper.make_node("Mul", [f"{value}_fp32", "factor"], [f"{value}_scaled"], name=f"scale_{value}"))
    island = onnx.NodeProto()
    island.CopyFrom(attention)
    island.input[:], island.output[:] = [f"{value}_scaled" for value in attention.input], ["attended_fp32"]
    put(last, attention, *before, island, cast("attended_fp32", attention.output[0], TensorProto.FLOAT16))


def attention_is_dropped(graph: onnx.ModelProto) -> None:
    last = body(graph, "MMDiTLastJointBlock")
    (attention,) = nodes(last, "Attention")
    bypass(last, attention, attention.input[2])


def attention_is_in_the_wrong_block(graph: onnx.ModelProto) -> None:
    """Two in the first block and none in the last: the model's total is right."""
    first = body(graph, "MMDiTJointBlock")
    (attention,) = nodes(first, "Attention")
    second, out = onnx.NodeProto(), attention.output[0]
    second.CopyFrom(attention)
    attention.output[0] = "attended_once"
    second.input[2], second.output[0], second.name = "attended_once", out, "node_Attention_twice"
    put(first, attention, attention, second)
    attention_is_dropped(graph)


def qk_norm_is_dropped(graph: onnx.ModelProto) -> None:
    first = body(graph, "MMDiTJointBlock")
    norm = nodes(first, "RMSNormalization")[2]
    bypass(first, norm, norm.input[0])


def layer_norm_is_dropped(graph: onnx.ModelProto) -> None:
    first = body(graph, "MMDiTJointBlock")
    norm = nodes(first, "LayerNormalization")[-1]
    bypass(first, norm, norm.input[0])


def call_is_renamed(graph: onnx.ModelProto) -> None:
    next(n for n in graph.graph.node if n.name == "blocks.1").name = "tail"


@dataclass(frozen=True)
class Break:
    """A way to break the graph of two fp16 blocks.

    Args:
        says: what the refusal says: the block, the node where there is one, and the reason.
        silent: blocks that it does not speak of.
    """

    change: Callable[[onnx.ModelProto], None]
    says: tuple[str, ...]
    silent: tuple[str, ...] = ("blocks.0",)
    decomposable: bool = False


BREAKS = {
    "the scores are an output": Break(
        scores_are_an_output,
        (
            "blocks.1: 1 Attention expected, 0 in the graph",
            "blocks.1: 0 Softmax expected, 1 in the graph (softmax)",
            "blocks.1: __myl_SlicReshMaxrSubExpSumDiv_myl0_",
            "is a softmax on its own, made of blocks.1: scores",
        ),
    ),
    "the scores are capped": Break(
        scores_are_capped,
        ("blocks.1: 1 Attention expected, 0 in the graph", "is a softmax on its own", "blocks.1: scores_Tanh"),
    ),
    "attention is written out, and TensorRT fuses it": Break(
        attention_is_written_out,
        (
            "blocks.1: 1 Attention expected, 0 in the graph",
            "_gemm_mha_v2_myl0_",
            "a fused kernel is made of one Attention, this one of blocks.1: attend, blocks.1: softmax, ",
        ),
    ),
    "attention in fp32": Break(
        attention_in_fp32,
        (
            "blocks.1: node_Attention_4 (Attention) is not one fused attention kernel; it became ",
            "SubExpSum",
            "(gemm)",
        ),
        decomposable=True,
    ),
    "no attention: V is passed on": Break(attention_is_dropped, ("blocks.1: 1 Attention expected, 0 in the graph",)),
    "attention in the wrong block": Break(
        attention_is_in_the_wrong_block,
        (
            "blocks.0: 1 Attention expected, 2 in the graph (node_Attention_4, node_Attention_twice)",
            "blocks.1: 1 Attention expected, 0 in the graph",
        ),
        silent=(),
    ),
    "no QK norm on the text's Q": Break(
        qk_norm_is_dropped,
        ("blocks.0: 4 RMSNormalization expected, 3 in the graph (node_rms_norm, node_rms_norm_1, node_rms_norm_3)",),
        silent=("blocks.1",),
    ),
    "no norm before the text's MLP": Break(
        layer_norm_is_dropped,
        ("blocks.0: 4 LayerNormalization expected, 3 in the graph (node_layer_norm, node_layer_norm_1, ",),
        silent=("blocks.1",),
    ),
    "a call has another name": Break(
        call_is_renamed,
        (
            "blocks.1: the graph has no such call; its calls are blocks.0, ",
            "tail: 0 Attention expected, 1 in the graph (node_Attention_4)",
        ),
        silent=(),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_graph_broken_on_purpose_is_refused(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers, name: str
) -> None:
    broken, (intact, folder) = BREAKS[name], saved_graph(tiny_spec, "fp16")
    graph = onnx.ModelProto()
    graph.CopyFrom(intact)
    broken.change(graph)
    layers = build_layers(graph, folder, decomposable=broken.decomposable)
    message = refusal(graph, layers, tiny_spec)
    for fragment in broken.says:
        assert fragment in message
    for block in broken.silent:
        assert f"{block}:" not in message


def test_allowing_tensorrt_to_write_attention_out_changes_nothing_where_it_can_fuse(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers
) -> None:
    graph, folder = saved_graph(tiny_spec, "fp16")
    layers = build_layers(graph, folder, decomposable=True)
    expected = implied_by_call(tiny_spec)
    assert check_fusion(graph, layers, expected, fused=True, profiles=1, what="test") == ATTENTIONS["plain"]


# --- engines that do not fit their graph


def test_the_intact_engine_passes(tiny_spec: ModelSpec, built: tuple) -> None:
    expected = implied_by_call(tiny_spec)
    assert check_fusion(*built, expected, fused=True, profiles=1, what="test") == ATTENTIONS["plain"]


def test_a_fused_attention_is_not_written_out(tiny_spec: ModelSpec, built: tuple) -> None:
    message = refusal(*built, tiny_spec, fused=False)
    assert "blocks.1: node_Attention_4 (Attention) is not written out; it became " in message
    assert "_gemm_mha_v2_myl0_" in message


def test_an_engine_without_kernels_is_refused(tiny_spec: ModelSpec, built: tuple) -> None:
    message = refusal(built[0], (), tiny_spec)
    assert "kernels for the profiles [0] expected; the engine has some for []" in message


def test_an_engine_lacks_a_profile(tiny_spec: ModelSpec, built: tuple) -> None:
    message = refusal(*built, tiny_spec, profiles=2)
    assert "kernels for the profiles [0, 1] expected; the engine has some for [0]" in message


def test_a_miss_in_one_profile_is_enough(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers, profiles: dict
) -> None:
    graph, folder = saved_graph(tiny_spec, "fp16")
    layers = build_layers(graph, folder, profiles["two"])
    missed = ("_gemm_mha_v2_myl1_", "blocks.1")
    left = [layer for layer in layers if not (layer.name.startswith(missed[0]) and layer.sources[0][1] == missed[1])]
    assert len(left) == len(layers) - 1
    message = refusal(graph, left, tiny_spec, profiles=2)
    assert "blocks.1: node_Attention_4 (Attention) is not one fused attention kernel" in message
    assert "(profile 1)" in message and "(profile 0)" not in message and "blocks.0" not in message


def test_kernels_of_another_call_are_not_this_ones(tiny_spec: ModelSpec, built: tuple) -> None:
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


def test_two_attentions_in_one_kernel_are_refused(tiny_spec: ModelSpec, built: tuple) -> None:
    graph, layers = built
    both = [
        dataclasses.replace(layer, sources=(("node_Attention_4", "blocks.0"), ("node_Attention_4", "blocks.1")))
        for layer in layers
        if layer.is_fused_attention
    ][:1]
    left = [layer for layer in layers if not layer.is_fused_attention]
    message = refusal(graph, [*left, *both], tiny_spec)
    assert "this one of blocks.0: node_Attention_4, blocks.1: node_Attention_4" in message


def test_a_norm_without_its_modulation_is_refused(tiny_spec: ModelSpec, built: tuple) -> None:
    graph, layers = built
    norm = ("node_layer_norm_2", "blocks.0")
    apart = [dataclasses.replace(layer, sources=(norm,)) if norm in layer.sources else layer for layer in layers]
    message = refusal(graph, apart, tiny_spec)
    assert "blocks.0: node_layer_norm_2 (LayerNormalization) is not fused with node_mul_" in message
    assert "; it became __myl_" in message


def test_a_softmax_beside_the_fused_kernel_is_refused(tiny_spec: ModelSpec, built: tuple) -> None:
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


def test_nested_functions_are_looked_into(
    tiny_spec: ModelSpec, saved_graph: SavedGraph, build_layers: BuildLayers
) -> None:
    intact, folder = saved_graph(tiny_spec, "fp16")
    graph = onnx.ModelProto()
    graph.CopyFrom(intact)
    last = body(graph, "MMDiTLastJointBlock")
    (attention,) = nodes(last, "Attention")
    inside = helper.make_node("Attention", ["q", "k", "v"], ["out"], name="inside")
    inside.attribute.extend(attention.attribute)
    opset = [helper.make_opsetid("", 23)]
    graph.functions.append(helper.make_function(last.domain, "MMDiTInner", ["q", "k", "v"], ["out"], [inside], opset))
    last.opset_import.append(helper.make_opsetid(last.domain, 1))
    call = helper.make_node(
        "MMDiTInner", list(attention.input), list(attention.output), name="inner", domain=last.domain
    )
    put(last, attention, call)
    layers = build_layers(graph, folder)
    assert ("inner/inside", "blocks.1") in {source for layer in layers for source in layer.sources}
    expected = implied_by_call(tiny_spec)
    assert check_fusion(graph, layers, expected, fused=True, profiles=1, what="test") == ATTENTIONS["plain"]
