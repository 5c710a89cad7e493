"""The fusion gate refuses the engine of a graph that was broken on purpose: by block, node and reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdit_deploy.build.gate import check_fusion
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.graph.census import implied_by_call
from mmdit_deploy.spec import ModelSpec

Refusal = Callable[..., str]
SavedGraph = Callable[..., tuple]
BuildLayers = Callable[..., tuple[EngineLayer, ...]]


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


def attention_in_fp32(graph: onnx.ModelProto, name: str = "MMDiTLastJointBlock") -> None:
    """Q, K and V are scaled in fp32, and attend so. Casts alone are moved behind the attention, which then fuses."""
    last = body(graph, name)
    (attention,) = nodes(last, "Attention")
    before = [constant("factor", np.array(1.5, np.float32))]
    for value in attention.input:
        before.append(cast(value, f"{value}_fp32", TensorProto.FLOAT))
        before.append(helper.make_node("Mul", [f"{value}_fp32", "factor"], [f"{value}_scaled"], name=f"scale_{value}"))
    island = onnx.NodeProto()
    island.CopyFrom(attention)
    island.input[:], island.output[:] = [f"{value}_scaled" for value in attention.input], ["attended_fp32"]
    put(last, attention, *before, island, cast("attended_fp32", attention.output[0], TensorProto.FLOAT16))


def attention_is_dropped(graph: onnx.ModelProto, name: str = "MMDiTLastJointBlock") -> None:
    last = body(graph, name)
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


def norm_is_dropped(graph: onnx.ModelProto, name: str, op: str, index: int) -> None:
    function = body(graph, name)
    norm = nodes(function, op)[index]
    bypass(function, norm, norm.input[0])


def call_is_renamed(graph: onnx.ModelProto) -> None:
    next(n for n in graph.graph.node if n.name == "blocks.1").name = "tail"


@dataclass(frozen=True)
class Break:
    """A way to break the fp16 graph of a tiny model.

    Args:
        family: of the model, if it is not SD3's.
        says: what the refusal says: the block, the node where there is one, and the reason.
        silent: blocks that it does not speak of.
    """

    change: Callable[[onnx.ModelProto], None]
    says: tuple[str, ...]
    silent: tuple[str, ...] = ("blocks.0",)
    decomposable: bool = False
    family: str | None = None


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
        lambda graph: norm_is_dropped(graph, "MMDiTJointBlock", "RMSNormalization", 2),
        ("blocks.0: 4 RMSNormalization expected, 3 in the graph (node_rms_norm, node_rms_norm_1, node_rms_norm_3)",),
        silent=("blocks.1",),
    ),
    "no norm before the text's MLP": Break(
        lambda graph: norm_is_dropped(graph, "MMDiTJointBlock", "LayerNormalization", -1),
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
    "no attention in single blocks": Break(
        lambda graph: attention_is_dropped(graph, "MMDiTSingleBlock"),
        tuple(f"single_blocks.{i}: 1 Attention expected, 0 in the graph" for i in range(4)),
        family="flux1",
    ),
    "attention of single blocks in fp32": Break(
        lambda graph: attention_in_fp32(graph, "MMDiTSingleBlock"),
        ("single_blocks.0: node_Attention_", " (Attention) is not one fused attention kernel; it became ", "(gemm)"),
        decomposable=True,
        family="flux1",
    ),
    "text is not normed": Break(
        lambda graph: norm_is_dropped(graph, "MMDiTTextEmbed", "RMSNormalization", 0),
        ("txt_embed: 1 RMSNormalization expected, 0 in the graph",),
        family="qwen-image",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_graph_broken_on_purpose_is_refused(
    tiny_spec: ModelSpec,
    tiny_families: Mapping[str, ModelSpec],
    saved_graph: SavedGraph,
    build_layers: BuildLayers,
    name: str,
    refusal: Refusal,
) -> None:
    broken = BREAKS[name]
    spec = tiny_spec if broken.family is None else tiny_families[broken.family]
    intact, folder = saved_graph(spec, "fp16")
    graph = onnx.ModelProto()
    graph.CopyFrom(intact)
    broken.change(graph)
    layers = build_layers(graph, folder, decomposable=broken.decomposable)
    message = refusal(graph, layers, spec)
    for fragment in broken.says:
        assert fragment in message
    for block in broken.silent:
        assert f" {block}:" not in message


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
    assert check_fusion(graph, layers, expected, fused=True, profiles=1, what="test") == {"blocks.0": 1, "blocks.1": 1}
