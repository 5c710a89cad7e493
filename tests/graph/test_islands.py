"""Islands of fp32 in a function of fp16: what is in them, where the casts are, and that no attention ever is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from mmdit_deploy.eager.program import Program
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.assemble import IR_VERSION
from mmdit_deploy.graph.named_functions import DOMAIN, define
from mmdit_deploy.graph.precision.fp8_attention import fp8_attention
from mmdit_deploy.graph.precision.islands import widen
from mmdit_deploy.graph.precision.quantized_linear import quantize_linear
from mmdit_deploy.graph.precision.wide_values import SIXTEEN_BIT, is_parameter
from mmdit_deploy.precision import SCHEMES
from mmdit_deploy.spec import ModelSpec

Functions = Callable[..., Mapping[str, ir.Function]]
FP32, BF16, FP16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16
STREAM = ("hidden_states", "add_226", "img_out")  # of the image, through a joint block
V = ("split_2_split_2", "view_2", "cat_2")
SIZES = {"batch": 2, "img_tokens": 6, "txt_tokens": 5, "img_tokens + txt_tokens": 11}


@pytest.fixture
def joint(fused_for: Functions, tiny_spec: ModelSpec) -> ir.Function:
    """A joint block of fp16, to be changed."""
    return fused_for(tiny_spec, "MMDiTJointBlock")["MMDiTJointBlock"].clone()


def values(function: ir.Function) -> dict[str, ir.Value]:
    return {v.name or "": v for v in (*function.inputs, *(v for node in function for v in node.outputs))}


def made_by(function: ir.Function, op: str) -> list[ir.Node]:
    return [node for node in function if node.op_type == op]


def called(function: ir.Function) -> onnx.ModelProto:
    """A model that is one call of a function, with everything that it reads as an input."""

    def own(value: ir.Value) -> ir.Value:
        return ir.Value(name=f"{value.name}.given", shape=value.shape, type=value.type)

    inputs, outputs = [own(v) for v in function.inputs], [own(v) for v in function.outputs]
    node = ir.Node(function.domain, function.name, inputs, outputs=outputs, name="call")
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 23, DOMAIN: 1}, name="one call")
    model = ir.Model(graph, ir_version=IR_VERSION)
    model.functions[function.identifier()] = function
    define(model)
    return ir.to_proto(model)


def run(function: ir.Function, given: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(called(function).SerializeToString(), options, ["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    with np.errstate(over="ignore"):  # what fp16 cannot hold is infinite
        fed = {i.name: given[i.name.removesuffix(".given")].numpy().astype(types[i.type]) for i in session.get_inputs()}
    return session.run(None, fed)


def given_to(function: ir.Function, stream: float) -> dict[str, torch.Tensor]:
    """Values for the inputs: small ones but for the image's stream, whose largest is given."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for value in function.inputs:
        shape = [dim if isinstance(dim, int) else SIZES[str(dim)] for dim in value.shape or ()]
        tensor = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if is_parameter(value) else 1)
        given[value.name or ""] = tensor.half().float()
    given["hidden_states"] *= stream / given["hidden_states"].abs().max()
    return given


def test_what_reads_or_makes_an_fp32_value_is_computed_in_fp32_and_nothing_else(joint: ir.Function) -> None:
    widen(joint, STREAM)
    reads = (n for n in joint if n.op_type != "Shape" and FP32 in {v.dtype for v in n.inputs if v is not None})
    computed = {node.outputs[0].name for node in reads}
    casts = {node.outputs[0].name for node in made_by(joint, "Cast")}
    islands = {"layer_norm", "add_61.fp32", "add_226", "layer_norm_2", "add_244.fp32", "img_out"}
    assert computed - casts == islands
    wide = {name for name, v in values(joint).items() if v.dtype == FP32 and name not in casts}
    assert wide == islands | {"hidden_states", "val_12.fp32"}  # and the norms' weight of ones
    assert [v.dtype for v in joint.outputs] == [FP32, FP16]


def test_a_norm_hands_on_to_its_modulate_in_fp32_which_comes_back_to_16_bit(joint: ir.Function) -> None:
    widen(joint, STREAM)
    norm, modulate = made_by(joint, "LayerNormalization")[0], made_by(joint, "MMDiTModulate")[0]
    assert modulate.inputs[0] is norm.outputs[0] and {v.dtype for v in modulate.inputs if v is not None} == {FP32}
    (back,) = [user for user, _ in modulate.outputs[0].uses()]
    assert back.op_type == "Cast" and back.outputs[0].dtype == FP16
    assert {user.op_type for user, _ in back.outputs[0].uses()} == {"MatMul"}


def test_a_product_that_is_fp32_is_so_before_its_bias_and_reads_weights_that_are_cast_once(joint: ir.Function) -> None:
    widen(joint, {"linear_4"})
    add = values(joint)["linear_4"].producer()
    assert add is not None and add.inputs[0] is not None
    product = add.inputs[0].producer()
    assert product is not None and product.op_type == "MatMul"
    assert {v.dtype for v in (*product.inputs, *add.inputs) if v is not None} == {FP32}
    assert len([node for node in made_by(joint, "Cast") if "img.mlp.down" in (node.inputs[0].name or "")]) == 2


@pytest.mark.parametrize("largest", [1.0, 2e5])
def test_a_widened_block_computes_what_the_eager_one_does(
    largest: float,
    joint: ir.Function,
    tiny_spec: ModelSpec,
    programs_for: Callable[..., Mapping[str, Program]],
) -> None:
    given = given_to(joint, largest)
    program = programs_for(tiny_spec, torch.float16)["MMDiTJointBlock"]
    expected = program.run(given, given)
    pure = run(joint, given)
    assert np.isfinite(pure[0]).all() == (largest < 65504)
    widen(joint, (*STREAM, "linear_4"))
    received = run(joint, given)
    assert received[0].dtype == np.float32
    for ours, theirs in zip(received, expected, strict=True):
        error = np.linalg.norm(ours.astype(np.float64) - theirs.double().numpy()) / float(theirs.double().norm())
        assert error < 1e-3


# A block of each kind of spelling: RoPE, SwiGLU, masks, modulation by token, a second attention.
BLOCKS = {
    "sd3": "MMDiTDualJointBlock",
    "flux1": "MMDiTSingleBlock",
    "flux2": "MMDiTSingleBlock",
    "qwen-image-edit-2511": "MMDiTJointBlock",
}


@pytest.mark.parametrize("model", BLOCKS)
def test_whatever_is_fp32_attention_is_not_casts_are_single_and_types_are_right(
    model: str, fused_for: Functions, tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec]
) -> None:
    spec = dataclasses.replace(tiny_spec, dual_attention_blocks=(0,)) if model == "sd3" else tiny_families[model]
    base = fused_for(spec, BLOCKS[model])[BLOCKS[model]]
    names = [name for name, v in values(base).items() if v.dtype in SIXTEEN_BIT and not is_parameter(v)]
    types = set()
    for name in names:
        function = base.clone()
        widen(function, {name})
        assert values(function)[name].dtype == FP32
        for attention in made_by(function, "Attention"):
            operands = {v.dtype for v in attention.inputs[:3] if v is not None}
            assert operands in ({FP16}, {BF16}), name
            types |= operands
        casts = [(n.inputs[0], n.outputs[0].dtype) for n in made_by(function, "Cast")]
        assert len(set(casts)) == len(casts) and all(v is not None and v.dtype != to for v, to in casts), name
        onnx.checker.check_model(called(function), full_check=True)
    assert len(names) > 15 and types == {FP16, BF16}


def test_attention_that_reads_fp32_values_is_computed_in_bf16(joint: ir.Function) -> None:
    widen(joint, V)
    (attention,) = made_by(joint, "Attention")
    assert {v.dtype for v in (*attention.inputs, *attention.outputs) if v is not None} == {BF16}
    assert values(joint)["view_6"].dtype == FP16  # behind the cast


@pytest.mark.parametrize(("wide", "clips"), [((), 1), (("hidden_states",), 1), (("tokens_out",), 0)])
def test_fp16s_clip_goes_where_its_value_is_fp32(
    wide: tuple[str, ...], clips: int, fused_for: Functions, tiny_families: Mapping[str, ModelSpec]
) -> None:
    block = fused_for(tiny_families["flux1"], "MMDiTSingleBlock")["MMDiTSingleBlock"].clone()
    widen(block, wide)
    assert len(made_by(block, "Clip")) == clips
    assert block.outputs[0].name == "tokens_out"
    assert block.outputs[0].dtype == (FP32 if "tokens_out" in wide else FP16)


@pytest.mark.parametrize("wide", [(), STREAM, ("linear_4",), (*STREAM, *V)])
def test_no_value_changes_nothing_and_neither_does_a_second_time(wide: tuple[str, ...], joint: ir.Function) -> None:
    before = ir.to_proto(joint).SerializeToString(deterministic=True)
    widen(joint, ())
    assert ir.to_proto(joint).SerializeToString(deterministic=True) == before
    widen(joint, wide)
    once = ir.to_proto(joint).SerializeToString(deterministic=True)
    widen(joint, wide)
    assert ir.to_proto(joint).SerializeToString(deterministic=True) == once
    assert (once == before) == (not wide)


def test_a_name_that_the_function_lacks_is_refused(joint: ir.Function) -> None:
    with pytest.raises(GraphError, match="linear_99"):
        widen(joint, {"linear_99"})


@pytest.mark.parametrize("wide", ["linear_4", "gelu"])
@pytest.mark.parametrize("scheme", ["fp8", "fp8-weights", "fp4", "w4a16"])
def test_a_quantized_layer_in_an_island_stays_whole_in_fp32(scheme: str, wide: str, joint: ir.Function) -> None:
    quantize_linear(joint, "img.mlp.down", SCHEMES[scheme], torch.float16)
    widen(joint, {wide})
    product = next(n for n in made_by(joint, "MatMul") if "img.mlp.down" in (n.inputs[1].name or ""))
    assert {v.dtype for v in product.inputs if v is not None} == {FP32}
    weight = product.inputs[1].producer()
    assert weight is not None and weight.op_type == "Transpose" and weight.inputs[0] is not None
    dequantize = weight.inputs[0].producer()
    assert dequantize is not None and dequantize.op_type == "DequantizeLinear"
    for node in quantizes(joint):
        assert node.inputs[0] is not None and node.inputs[0].dtype == (FP32 if wide == "gelu" else FP16)
    assert len(quantizes(joint)) == (scheme in ("fp8", "fp4"))
    onnx.checker.check_model(called(joint))


@pytest.mark.parametrize("wide", ["linear_4", "gelu"])
def test_a_layer_whose_tokens_are_divided_by_their_largest_is_in_fp32_around_its_product(
    wide: str, joint: ir.Function
) -> None:
    quantize_linear(joint, "img.mlp.down", SCHEMES["int8"], torch.float16)
    widen(joint, {wide})
    found = values(joint)
    assert found["img.mlp.down.peak"].dtype == (FP32 if wide == "gelu" else FP16)
    # Where the result does not fit, the weights alone may be why.
    for name in ("img.mlp.down.product", "img.mlp.down.by_channel", "linear_4"):
        assert (found[name].dtype == FP32) == (wide == "linear_4")
    (codes,) = quantizes(joint)
    assert codes.inputs[0] is not None and codes.inputs[0].dtype == FP16
    onnx.checker.check_model(called(joint))


def quantizes(function: ir.Function) -> list[ir.Node]:
    """Where what a layer reads is quantized."""
    return [n for n in made_by(function, "QuantizeLinear") if (n.name or "").endswith("down.quantize")]


def test_fp8_attention_refuses_what_fp16_cannot_hold(joint: ir.Function) -> None:
    fp8_attention(joint, 1)
    with pytest.raises(GraphError, match="in FP8 has 16-bit Q, K and V"):
        widen(joint, V)
