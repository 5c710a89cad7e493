"""A quantized linear layer of a function computes what its scheme says, in ONNX Runtime as in torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.lower.emulate_fp4 import emulate_fp4
from mmdit_deploy.graph.precision.quantized_linear import quantize_linear
from mmdit_deploy.graph.precision.recognized import scheme_of
from mmdit_deploy.precision import SCHEMES, LinearPlan, Scheme
from mmdit_deploy.precision.formats import rounded
from mmdit_deploy.precision.quantize import dequantize, quantize_weight, simulate
from mmdit_deploy.runtime import open_session, run_session

ROWS, COLUMNS = 24, 128
RANGE = 1.25  # of inputs, as calibrated
SPELLED = {
    "MatMul": "t = Transpose<perm = [1, 0]>(w) p = MatMul(x, t) y = Add(p, b)",
    "Gemm": "y = Gemm<transB = 1>(x, w, b)",
}
TYPES = {"fp32": (torch.float32, "float"), "fp16": (torch.float16, "float16"), "bf16": (torch.bfloat16, "bfloat16")}
# Of fp16 what rounding x · p and the dequantized values costs: a few inputs fall into the next step of the format.
TOLERANCE = {"fp32": 1e-6, "fp16": 4e-3}


def model_of(spelled: str, precision: str, linear: str = "mlp.up") -> ir.Model:
    """A model of one call of a function that is one linear layer; its weights are inputs."""
    type_ = TYPES[precision][1]
    dims = "B" if spelled == "Gemm" else "B,N"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23, "d": 1]>
        g ({type_}[{dims},{COLUMNS}] x, {type_}[{ROWS},{COLUMNS}] w, {type_}[{ROWS}] b) => ({type_}[{dims},{ROWS}] y) {{
            y = d.Dense(x, w, b)
        }}
        <domain: "d", opset_import: ["": 23]>
        Dense (x, w, b) => (y) {{ {SPELLED[spelled]} }}"""
    )
    model = ir.from_proto(proto)
    (function,) = model.functions.values()
    for inside, outside in zip(function.inputs, model.graph.inputs, strict=True):
        inside.type, inside.shape = outside.type, outside.shape
    for node in function:
        node.outputs[0].type = function.inputs[0].type
        if node.op_type != "Transpose":
            node.outputs[0].shape = model.graph.outputs[0].shape
        node.name = f"node_{node.op_type}"
    function.inputs[1].name, function.inputs[2].name = f"{linear}.weight", f"{linear}.bias"
    return model


def quantized(spelled: str, precision: str, scheme: Scheme) -> ir.Model:
    """The same with the layer quantized; all of its tensors are inputs of the model."""
    model = model_of(spelled, precision)
    (function,) = model.functions.values()
    first, *others = quantize_linear(function, "mlp.up", scheme, TYPES[precision][0])
    (call,) = model.graph
    model.graph.inputs[1].type = function.inputs[1].type
    call.resize_inputs(3 + len(others))
    for i, (tensor, inside) in enumerate(zip(others, function.inputs[3:], strict=True)):
        value = ir.Value(name=tensor.name, type=inside.type, shape=inside.shape)
        model.graph.inputs.append(value)
        call.replace_input_with(3 + i, value)
    assert first.name == "weight"
    return model


def plan_of(scheme: Scheme) -> LinearPlan:
    smooth = torch.linspace(0.5, 2, COLUMNS).bfloat16().float() if scheme.smooth else None
    return LinearPlan(scheme, RANGE if scheme.activations in ("tensor", "block") else None, smooth)


def tensors(scheme: Scheme, compute: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """An input of which some is beyond the calibrated range, and a token nothing; a bias; and the layer's tensors."""
    weight = random_tensor(0, "w", (ROWS, COLUMNS), std=0.1) * torch.logspace(-1, 1, ROWS).unsqueeze(1)
    x = random_tensor(1, "x", (2, 5, COLUMNS), std=1.0).to(compute).float()
    x[1] = 0
    assert (x.abs() > RANGE).any()
    return (
        x,
        random_tensor(2, "b", (ROWS,), std=1.0).to(compute).float(),
        quantize_weight(weight, plan_of(scheme), compute),
    )


def stored_as_initializers(model: ir.Model, given: dict[str, Tensor]) -> onnx.ModelProto:
    """The layer's tensors in the model itself: torch and numpy lack types that an input would need."""
    proto = ir.to_proto(model)
    names = {"w": "weight"}
    for value in list(proto.graph.input):
        tensor = given.get(names.get(value.name, value.name))
        if tensor is not None:
            proto.graph.initializer.append(
                onnx.TensorProto(
                    name=value.name,
                    data_type=value.type.tensor_type.elem_type,
                    dims=[d.dim_value for d in value.type.tensor_type.shape.dim],
                    raw_data=tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
                )
            )
            proto.graph.input.remove(value)
    return proto


def execute(proto: onnx.ModelProto, x: Tensor, bias: Tensor, compute: torch.dtype) -> Tensor:
    onnx.checker.check_model(proto, full_check=True)
    session = open_session(proto.SerializeToString(), "ort-cpu")
    given = {"x": x.to(compute), "b": bias.to(compute)}
    return run_session(session, given, [("y", compute, (*x.shape[:-1], ROWS))])["y"].float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("name", SCHEMES)
def test_it_computes_what_its_scheme_says(name: str, spelled: str, precision: str) -> None:
    scheme, compute = SCHEMES[name], TYPES[precision][0]
    x, bias, stored = tensors(scheme, compute)
    if spelled == "Gemm":
        x = x[:, 0]
    model = quantized(spelled, precision, scheme)
    emulate_fp4.apply(model)
    made = execute(stored_as_initializers(model, stored), x, bias, compute)
    expected = simulate(x, stored, scheme, compute) + bias
    assert distance(made, expected) <= TOLERANCE[precision]
    plain = torch.nn.functional.linear(x, dequantize(stored, scheme), bias)
    exact = scheme.activations == "none"
    assert (distance(made, plain) <= TOLERANCE[precision]) == exact  # else the input's rounding is seen


@pytest.mark.parametrize("name", SCHEMES)
def test_its_tensors_are_inputs_and_its_values_have_types_and_shapes(name: str) -> None:
    scheme = SCHEMES[name]
    model = quantized("MatMul", "fp16", scheme)
    (function,) = model.functions.values()
    stored = tensors(scheme, torch.float16)[2]
    assert [v.name for v in function.inputs][3:] == [f"mlp.up.{n}" for n in stored if n != "weight"]
    assert all(v.type is not None and v.shape is not None for node in function for v in node.outputs)
    assert len({node.name for node in function}) == sum(1 for _ in function)
    assert [scheme_of(node) for node in function if node.op_type == "MatMul"] == [name]
    assert "node_MatMul" in {node.name for node in function}  # engines call their kernels so
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def other_product(function: ir.Function) -> None:
    next(node for node in function if node.op_type == "Transpose").op_type = "Neg"


def read_twice(function: ir.Function) -> None:
    function.append(ir.node("Neg", [function.inputs[1]]))


def scaled(function: ir.Function) -> None:
    gemm = next(node for node in function if node.op_type == "Gemm")
    gemm.attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)


@pytest.mark.parametrize(
    ("spelled", "change"), [("MatMul", other_product), ("MatMul", read_twice), ("Gemm", read_twice), ("Gemm", scaled)]
)
def test_a_layer_that_is_spelled_in_another_way_is_refused(spelled: str, change: Callable[[ir.Function], None]) -> None:
    (function,) = model_of(spelled, "fp16").functions.values()
    change(function)
    with pytest.raises(GraphError, match=r"one product of Dense with mlp\.up\.weight"):
        quantize_linear(function, "mlp.up", SCHEMES["fp8"], torch.float16)


def test_a_layer_that_the_function_lacks_is_refused() -> None:
    (function,) = model_of("MatMul", "fp16").functions.values()
    with pytest.raises(GraphError, match="its weight is read by nothing"):
        quantize_linear(function, "mlp.down", SCHEMES["fp8"], torch.float16)


@pytest.mark.parametrize(("form", "code"), [("fp8", 17), ("int8", 3)])
def test_every_half_is_rounded_as_torch_rounds_it(form: str, code: int) -> None:
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23]>
        g (float16[N] x) => (float16[N] y) {{
            one = Constant<value_float = 1.0>()
            s = CastLike(one, x)
            q = QuantizeLinear<output_dtype = {code}>(x, s)
            y = DequantizeLinear(q, s)
        }}"""
    )
    session = open_session(proto.SerializeToString(), "ort-cpu")
    made = run_session(session, {"x": halves}, [("y", torch.float16, tuple(halves.shape))])["y"].float()
    assert torch.equal(made, rounded(halves.float(), form))


def test_emulated_fp4_weights_are_torchs_to_the_bit() -> None:
    """All 16 values in both halves of a byte, with unlike scales."""
    scheme = SCHEMES["fp4"]
    stored = tensors(scheme, torch.float32)[2]
    stored["weight"] = torch.arange(ROWS * COLUMNS // 2).remainder(256).to(torch.uint8).view(ROWS, COLUMNS // 2)
    model = quantized("MatMul", "fp32", scheme)
    assert emulate_fp4.apply(model) == 2
    (function,) = model.functions.values()
    weight = next(node for node in function if node.op_type == "Transpose").inputs[0]
    assert weight is not None
    function.outputs[0] = weight
    model.graph.outputs[0].shape = ir.Shape([ROWS, COLUMNS])
    model.graph.inputs[1].shape = ir.Shape([ROWS, COLUMNS // 2])
    proto = stored_as_initializers(model, stored)
    session = open_session(proto.SerializeToString(), "ort-cpu")
    made = session.run(None, {"x": np.zeros((1, 1, COLUMNS), np.float32), "b": np.zeros(ROWS, np.float32)})[0]
    assert torch.equal(torch.from_numpy(np.asarray(made)), dequantize(stored, scheme))
    assert emulate_fp4.apply(model) == 0  # a second run changes nothing


def test_emulated_fp4_inputs_round_half_to_even() -> None:
    """Every value of E2M1, every tie between two and their neighbours."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, ties, ties * 0.999, ties * 1.001])
    x = torch.cat([x, -x, torch.tensor([6.0, -6.0] * 6)])  # a block's largest is 6, so that its scale is 1
    x = torch.nn.functional.pad(x, (0, COLUMNS - len(x)))
    x = torch.stack([torch.tensor([6.0, *row[:15]]) for row in x.split(15) if len(row) == 15]).flatten()[:COLUMNS]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23]>
        g (float[N,{COLUMNS}] x, float[N,{COLUMNS // 16}] s) => (float[N,{COLUMNS}] y) {{
            q = QuantizeLinear<axis = -1, block_size = 16, output_dtype = 23>(x, s)
            y = DequantizeLinear<axis = -1, block_size = 16>(q, s)
        }}"""
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert emulate_fp4.apply(model) == 1
    session = open_session(ir.to_proto(model).SerializeToString(), "ort-cpu")
    feed = {"x": x[None], "s": torch.ones(1, COLUMNS // 16)}
    made = run_session(session, feed, [("y", torch.float32, (1, COLUMNS))])["y"][0]
    assert torch.equal(made, rounded(x, "fp4"))
    assert made[x.abs() == 0.25].tolist() == [0.0] * int((x.abs() == 0.25).sum())
    assert made[x == 5.0].tolist() == [4.0] * int((x == 5.0).sum())
