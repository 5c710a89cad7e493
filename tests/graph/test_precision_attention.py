"""FP8 attention as a named function: what it computes, and what it is made of."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx_shape_inference import infer_symbolic_shapes
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.lower.spelled_out import fp8_attention_spelled_out
from mmdit_deploy.graph.named_functions import define
from mmdit_deploy.graph.precision.fp8_attention import fp8_attention
from mmdit_deploy.precision import AttentionScales
from mmdit_deploy.precision.quantize import attention_scales, simulate_attention
from mmdit_deploy.runtime import open_session, run_session

HEADS, DIM, TOKENS = 3, 16, 7
AMAX = AttentionScales(1.5, 1.6, 1.0)  # of V some is beyond it
TYPES = {"float": torch.float32, "float16": torch.float16}


def model_of(type_: str = "float", *, masked: bool = False, attributes: str = "") -> ir.Model:
    """One call of a block that is one attention; its scales are inputs."""
    qkv = [f"{type_}[B,N,{HEADS * DIM}] {name}" for name in "qkv"]
    read = ["q", "k", "v", *(["expanded"] if masked else [])]
    arguments = ["q", "k", "v", *(["mask"] if masked else [])]
    expand = "shape = Constant<value_ints = [1, 1, 7, 1]>() expanded = Expand(mask, shape)" if masked else ""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23, "d": 1, "mmdit": 1]>
        g ({", ".join([*qkv, *([f"{type_}[B,1,1,N] mask"] if masked else [])])}) => ({type_}[B,N,{HEADS * DIM}] y) {{
            y = d.Block({", ".join(arguments)})
        }}
        <domain: "d", opset_import: ["": 23, "mmdit": 1]>
        Block ({", ".join(arguments)}) => (y) {{
            {expand} y = Attention<q_num_heads = {HEADS}, kv_num_heads = {HEADS}{attributes}>({", ".join(read)})
        }}"""
    )
    model = ir.from_proto(proto)
    (function,) = model.functions.values()
    for inside, outside in zip(function.inputs, model.graph.inputs, strict=True):
        inside.type, inside.shape = outside.type, outside.shape
    for node in function:
        node.name = f"node_{node.op_type}"
        if node.op_type == "Constant":
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([4])
        if node.op_type == "Expand":
            node.outputs[0].type, node.outputs[0].shape = function.inputs[3].type, ir.Shape(["B", 1, "N", "N"])
    function.outputs[0].type, function.outputs[0].shape = model.graph.outputs[0].type, model.graph.outputs[0].shape
    return model


def in_fp8(model: ir.Model) -> ir.Model:
    (function,) = model.functions.values()
    before = len(function.inputs)
    fp8_attention(function, 1)
    (call,) = model.graph
    more = function.inputs[before:]
    call.resize_inputs(before + len(more))
    for i, inside in enumerate(more):
        value = ir.Value(name=inside.name, type=inside.type, shape=inside.shape)
        model.graph.inputs.append(value)
        call.replace_input_with(before + i, value)
    define(model)
    return model


def feed_of(compute: torch.dtype, *, masked: bool) -> dict[str, Tensor]:
    feed = {name: random_tensor(0, name, (2, TOKENS, HEADS * DIM), std=0.9).to(compute) for name in "qkv"}
    if masked:
        feed["mask"] = torch.zeros(2, 1, 1, TOKENS, dtype=compute)
        feed["mask"][1, ..., 4:] = -60000
    for name, scale in zip("qkv", attention_scales(AMAX, DIM, compute), strict=True):
        feed[f"attention.0.{name}_scale"] = scale
    return feed


def execute(model: ir.Model, feed: dict[str, Tensor], compute: torch.dtype) -> Tensor:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = open_session(proto.SerializeToString(), "ort-cpu")
    return run_session(session, feed, [("y", compute, (2, TOKENS, HEADS * DIM))])["y"].float()


def expected_of(feed: dict[str, Tensor]) -> Tensor:
    q, k, v = (feed[n].float().unflatten(-1, (HEADS, DIM)).transpose(1, 2) for n in "qkv")
    scales = attention_scales(AMAX, DIM, feed["q"].dtype)
    mask = feed["mask"].float() if "mask" in feed else None
    return simulate_attention(q, k, v, scales, mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(("type_", "tolerance"), [("float", 1e-5), ("float16", 1e-2)])
def test_it_computes_what_the_scheme_says(type_: str, tolerance: float, masked: bool) -> None:
    """fp16 moves some numbers into the next step of E4M3."""
    feed = feed_of(TYPES[type_], masked=masked)
    made = execute(in_fp8(model_of(type_, masked=masked)), feed, TYPES[type_])
    expected = expected_of(feed)
    assert float((made - expected).norm() / expected.norm()) <= tolerance
    q, k, v = (feed[n].float().unflatten(-1, (HEADS, DIM)).transpose(1, 2) for n in "qkv")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert 0.01 < float((made[0] - exact[0]).norm() / exact[0].norm()) < 0.3


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("type_", TYPES)
def test_spelled_out_it_is_the_same_numbers_with_types_and_shapes(type_: str, masked: bool) -> None:
    model = in_fp8(model_of(type_, masked=masked))
    feed = feed_of(TYPES[type_], masked=masked)
    before = execute(model, feed, TYPES[type_])
    assert fp8_attention_spelled_out.apply(model) == 1
    (function,) = model.functions.values()
    assert torch.equal(execute(model, feed, TYPES[type_]), before)
    values = [v for node in function for v in node.outputs]
    assert all(v.type is not None and v.shape is not None for v in values)
    quantized = [node.outputs[0] for node in function if node.op_type == "QuantizeLinear"]
    assert [v.dtype for v in quantized] == [ir.DataType.FLOAT8E4M3FN] * 4
    shares = next(node.outputs[0] for node in function if node.op_type == "Softmax")
    assert [str(getattr(d, "value", d)) for d in shares.shape or ()] == ["B", str(HEADS), "N", "N"]
    assert not any(node.op_type == "CastLike" for node in function)  # TensorRT wants scales that are constants
    assert fp8_attention_spelled_out.apply(model) == 0


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_shapes_are_inferred_through_it(masked: bool) -> None:
    model = in_fp8(model_of("float16", masked=masked))
    for out in (model.graph.outputs[0], model.graph[0].outputs[0]):
        out.shape = None
    symbolic = model.clone()
    infer_symbolic_shapes(symbolic)
    assert symbolic.graph[0].outputs[0].dtype == ir.DataType.FLOAT16
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True).graph.output[0]
    assert inferred.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_a_mask_of_keys_is_not_spelled_out_for_every_query() -> None:
    model = in_fp8(model_of(masked=True))
    function = next(f for f in model.functions.values() if f.domain == "d")
    call = next(node for node in function if node.op_type == "MMDiTFP8MaskedAttention")
    assert call.inputs[3] is function.inputs[3]


@pytest.mark.parametrize(
    ("attributes", "count", "message"),
    [(", is_causal = 1", 1, "only a mask"), (", softcap = 1.0", 1, "only a mask"), ("", 2, "has 1 attention")],
)
def test_what_is_no_plain_attention_is_refused(attributes: str, count: int, message: str) -> None:
    (function,) = model_of(attributes=attributes).functions.values()
    with pytest.raises(GraphError, match=message):
        fp8_attention(function, count)
