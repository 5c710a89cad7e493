"""Reading an engine's layer list: on an excerpt of TensorRT-RTX 1.7's log, and on engines built here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit_deploy.build.layers import (
    EngineLayer,
    LayerTensor,
    kernels_by_call,
    kernels_by_type,
    parse_inspector,
    parse_layer_list,
)
from mmdit_deploy.errors import GraphError
from mmdit_deploy.spec import ModelSpec

# Ten of the 120 layers of a two-block fp16 model with two profiles, as TensorRT-RTX 1.7.1 wrote them.
EXCERPT = Path(__file__).with_name("layer_list.txt").read_text()
CALLS = ("conditioning", "modulations.0.img", "blocks.0", "modulations.1.img", "blocks.1", "final_modulation", "final")


def kernel(name: str, *sources: tuple[str, str], type: str = "kgen", profile: int = 0) -> EngineLayer:
    return EngineLayer(name, type, profile, sources, (), (), "")


def test_layers_are_read_from_the_log() -> None:
    layers = parse_layer_list(EXCERPT)
    assert [layer.type for layer in layers] == [
        *("shape_call", "gemm", "kgen", "kgen", "signal", "wait"),
        *("gemm", "kgen", "kgen", "kgen"),
    ]
    attention = layers[2]
    assert attention.name == "_gemm_mha_v2_myl0_22"
    assert attention.sources == (("node_Attention_4", "blocks.0"),)
    assert [tensor.dims for tensor in attention.inputs] == [(-1, -1, 32), (-1, 32, -1), (-1, -1, 32)]
    assert attention.outputs == (LayerTensor("__mye66561_myl0", (-1, -1, 32), "Half"),)
    assert [layer.name for layer in layers if layer.is_fused_attention] == [
        "_gemm_mha_v2_myl0_22",
        "_gemm_mha_v2_myl1_27",
    ]
    product = layers[1]
    assert [tensor.dims for tensor in product.constants or ()] == [(40, 1408), (1,), (1,)]
    assert attention.constants == ()
    mixed = layers[3]
    assert mixed.tactic.startswith("__myl_AddReshSlic") and mixed.tactic.endswith("_vec")
    assert mixed.sources[0] == ("node_linear_4", "blocks.0")
    assert {call for _, call in mixed.sources} == {"blocks.0", "blocks.1", "modulations.1.img"}


def test_what_waits_or_computes_shapes_is_no_kernel() -> None:
    layers = parse_layer_list(EXCERPT)
    assert [layer.name for layer in layers if not layer.is_kernel] == [
        "__mye19295_0_myl0_0",
        "__mye73522_myl0_36",
        "__mye73524_myl0_37",
    ]
    assert kernels_by_type(layers) == {"kgen": 5, "gemm": 2}


def test_profiles_are_told_apart() -> None:
    """Not every layer of the second plan has `[profile 1]` in a name, but each is of the same Myelin graph."""
    layers = parse_layer_list(EXCERPT)
    assert [layer.profile for layer in layers] == [0] * 6 + [1] * 4
    assert "[profile" not in next(line for line in EXCERPT.split("\n") if "_gemm_mha_v2_myl1_27" in line)


def test_graphs_are_not_profiles() -> None:
    """Enterprise TensorRT may have several Myelin graphs in one plan."""
    renumbered = EXCERPT.replace("_myl1", "_myl7").replace(" [profile 1]", "")
    assert {layer.profile for layer in parse_layer_list(renumbered)} == {0}


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", "", "\x1f\x1e"])
def test_sources_are_separated_by_control_characters_or_nothing(separator: str) -> None:
    """A record separator must not end the line."""
    assert "]\x1f[" in EXCERPT
    assert parse_layer_list(EXCERPT.replace("\x1f", separator)) == parse_layer_list(EXCERPT)


@pytest.mark.parametrize(
    ("metadata", "source"),
    [
        ("node_a", ("node_a", "")),
        ("node_a | blocks.1 (Block)", ("node_a", "blocks.1")),
        ("node_a | norm (Norm) | blocks.1 (Block)", ("norm/node_a", "blocks.1")),
        ("node_a | x (X) | norm (Norm) | blocks.1 (Block)", ("norm/x/node_a", "blocks.1")),
    ],
)
def test_nested_functions_belong_to_the_outermost_call(metadata: str, source: tuple[str, str]) -> None:
    text = EXCERPT.replace("node_Attention_4 | blocks.0 (MMDiTJointBlock)", metadata)
    assert parse_layer_list(text)[2].sources == (source,)


@pytest.mark.parametrize(
    "text", ["", "Layers:\n\nI/O Tensors:\n Name: sample, IOMode: Output", "[ONNX Layer: node_Attention_4 | blocks.0]"]
)
def test_no_layer_list_is_an_error(text: str) -> None:
    with pytest.raises(GraphError, match="no layer list") as caught:
        parse_layer_list(text)
    assert caught.value.exit_status == 3
    assert "ProfilingVerbosity.DETAILED" in str(caught.value)


def test_a_line_that_cannot_be_read_is_an_error() -> None:
    """It might have been the softmax that the gate looks for."""
    with pytest.raises(GraphError, match="_gemm_mha_v2_myl0_22"):
        parse_layer_list(EXCERPT.replace("Outputs: [ { Name: __mye66561_myl0", "Made: [ { Name: __mye66561_myl0"))


def test_json_round_trip() -> None:
    for layer in parse_layer_list(EXCERPT):
        sized = tuple(dataclasses.replace(tensor, elements=7) for tensor in layer.inputs)
        for made in (layer, dataclasses.replace(layer, inputs=sized, constants=None, flops=5)):
            assert EngineLayer.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_json_of_before_there_were_sizes() -> None:
    """Layers as format 1 had them: nothing is known of constants, and of none it is said that there are none."""
    for layer in parse_layer_list(EXCERPT):
        data = layer.to_json()
        del data["constants"], data["flops"]
        for tensor in (*data["inputs"], *data["outputs"]):
            assert tensor.pop() is None
        assert EngineLayer.from_json(data) == dataclasses.replace(layer, constants=None)


def test_an_inspector_may_not_say_constants() -> None:
    layers = parse_layer_list(EXCERPT)
    data = json.loads(inspector_json(layers, "Datatype", ""))
    for layer in data["Layers"]:
        del layer["Constants"]
    assert {layer.constants for layer in parse_inspector(json.dumps(data))} == {None}


def inspector_json(layers: tuple[EngineLayer, ...], dtype_key: str, separator: str) -> str:
    """What enterprise TensorRT's inspector gives for such layers.

    Written by NVIDIA's documentation (engine inspector, migration from 10.x to 11.x) and its engine explorer, not by
    TensorRT: its libraries are not on PyPI.
    """

    def tensors(of: tuple[LayerTensor, ...]) -> list[object]:
        return [{"Name": t.name, "Location": "Device", "Dimensions": list(t.dims), dtype_key: t.dtype} for t in of]

    entries = [
        {
            "Name": layer.name,
            "LayerType": layer.type,
            "Inputs": tensors(layer.inputs),
            "Constants": tensors(layer.constants or ()),
            "Outputs": tensors(layer.outputs),
            "TacticName": layer.tactic,
            "StreamId": 0,
            "Metadata": separator.join(f"[ONNX Layer: {node} | {call} (Function)]" for node, call in layer.sources),
        }
        for layer in layers
    ]
    return json.dumps({"Layers": entries, "Bindings": ["sample", "sample [profile 1]"]})


@pytest.mark.parametrize("dtype_key", ["Format/Datatype", "Datatype"])
@pytest.mark.parametrize("separator", ["\x1e", "\x1f", ""])
def test_the_inspector_gives_the_same_layers(dtype_key: str, separator: str) -> None:
    layers = parse_layer_list(EXCERPT)
    text = inspector_json(layers, dtype_key, separator)
    assert parse_inspector(text) == layers
    unescaped = text.replace("\\u001e", "\x1e").replace("\\u001f", "\x1f")
    assert parse_inspector(unescaped) == layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"Layers": []}',
        '{"Layers": ["node_linear + node_gelu"]}',  # built with LAYER_NAMES_ONLY, the default
        '{"Layers": [{"Name": "x"}]}',
        '{"Layers": [{"Name": "x", "LayerType": "gemm", "Inputs": [{"Name": "a", "Dimensions": [1]}], "Outputs": []}]}',
    ],
)
def test_an_inspector_without_details_is_an_error(text: str) -> None:
    with pytest.raises(GraphError, match="the engine inspector lists the engine's layers"):
        parse_inspector(text)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("_gemm_mha_v2_myl0_22", True),
        ("_gemm_mha_v1_myl0_41", True),  # one image token in all
        ("_gemv_mha_v1_myl3_6", True),
        ("__mye8037_gemm_mha_v2_myl3_6", True),
        ("__myl_MaxrSubExpSum_myl0_22", False),
        ("node_gemm_mha_v2_myl0_22", False),
    ],
)
def test_fused_attention_by_name(name: str, fused: bool) -> None:
    assert kernel(name).is_fused_attention is fused


@pytest.mark.parametrize(
    ("name", "exponential"),
    [
        ("__myl_SlicMaxrSubExpSum_myl0_23", True),
        ("__myl_SlicSlicMaxSubExpSlicSlicAddDivMul_myl0_20", True),
        ("__myl_ReshExpaMul_myl0_1", False),
        ("__myl_FcAddSilu_myl0_8", False),
        ("node_Exp_myl0_8", False),
    ],
)
def test_exponential_by_name(name: str, exponential: bool) -> None:
    assert kernel(name).has_exponential is exponential


def test_a_kernel_counts_for_the_call_that_most_of_its_nodes_are_in() -> None:
    layers = (
        kernel("a", ("x", "blocks.0")),
        kernel("b", ("x", "blocks.0"), ("y", "blocks.0"), ("x", "blocks.1")),
        kernel("c", ("x", "blocks.1"), ("y", "blocks.0")),  # a tie: where the result goes
        kernel("d", ("m", "final_modulation"), ("m", "modulations.0.img"), ("m", "modulations.1.img"), type="gemm"),
        kernel("e"),
        kernel("f", ("reformat", "")),
        kernel("g", ("x", "blocks.1"), type="wait"),
    )
    counts = kernels_by_call(layers, CALLS)
    assert counts == {"blocks.0": 2, "blocks.1": 1, "final_modulation": 1, "engine": 2}
    assert list(counts) == ["blocks.0", "blocks.1", "final_modulation", "engine"]
    assert sum(counts.values()) == sum(kernels_by_type(layers).values())


def test_the_excerpt_by_call() -> None:
    layers = parse_layer_list(EXCERPT)
    counts = {"conditioning": 1, "blocks.0": 3, "blocks.1": 1, "final_modulation": 1, "final": 1}
    assert kernels_by_call(layers, CALLS) == counts


def test_kernels_of_one_more_block_are_those_of_the_block(
    tiny_spec: ModelSpec, saved_graph: Callable[..., tuple], build_layers: Callable[..., tuple]
) -> None:
    """Counting by call agrees with the definition by difference: (kernels at depth a − at depth b)/(a − b)."""
    totals, blocks = {}, {}
    for depth in (3, 4):
        graph, folder = saved_graph(dataclasses.replace(tiny_spec, depth=depth), "fp16")
        layers = build_layers(graph, folder)
        counts = kernels_by_call(layers, [node.name for node in graph.graph.node])
        assert "engine" not in counts
        totals[depth], blocks[depth] = sum(counts.values()), counts["blocks.1"]
    assert totals[4] - totals[3] == blocks[3] == blocks[4]
    assert 15 <= blocks[4] <= 25  # 21 with TensorRT-RTX 1.7.1


def test_each_profile_has_a_plan_of_its_own(
    tiny_spec: ModelSpec, profiles: dict, saved_graph: Callable[..., tuple], build_layers: Callable[..., tuple]
) -> None:
    graph, folder = saved_graph(tiny_spec, "fp16")
    both = build_layers(graph, folder, profiles["two"])
    for profile, alone in enumerate(("one", "one size")):
        separate = build_layers(graph, folder, profiles[alone])
        plan = [layer for layer in both if layer.profile == profile]
        assert kernels_by_type(plan) == kernels_by_type(separate)
        assert {layer.profile for layer in separate} == {0}
