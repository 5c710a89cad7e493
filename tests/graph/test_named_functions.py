"""Named functions: what they compute in every type, and that their names are nobody else's."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_shape_inference import infer_symbolic_shapes

from mmdit_deploy.graph.fuse.gated_residual import gated_residual
from mmdit_deploy.graph.fuse.modulate import modulate
from mmdit_deploy.graph.fuse.silu import silu
from mmdit_deploy.graph.fuse.swiglu import swiglu
from mmdit_deploy.graph.lower.spelled_out import spelled_out
from mmdit_deploy.graph.named_functions import (
    DOMAIN,
    FP8_ATTENTIONS,
    NAMED_FUNCTIONS,
    define,
    definition,
    is_named_function,
    make_way,
)
from mmdit_deploy.graph.passes import run

RULES = (silu, swiglu, modulate, gated_residual)
BY_RULES = [name for name in NAMED_FUNCTIONS if name not in FP8_ATTENTIONS]  # those are planned: see test_precision_*
SIZES = {"B": 2, "N": 5}
Feed = dict[str, np.ndarray]

# Inputs of each, and what it computes as numpy does; each op rounds to the type of its inputs.
COMPUTES: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "MMDiTSiLU": ("{t}[B,N,8] x", lambda x: x * _sigmoid(x)),
    "MMDiTSwiGLU": ("{t}[B,N,8] x, {t}[B,N,8] value", lambda x, value: x * _sigmoid(x) * value),
    "MMDiTModulate": (
        "{t}[B,N,8] x, {t}[B,1,8] scale, {t}[B,1,8] shift",
        lambda x, scale, shift: x * (scale + 1) + shift,
    ),
    "MMDiTGatedResidual": ("{t}[B,N,8] x, {t}[B,1,8] gate, {t}[B,N,8] y", lambda x, gate, y: x + gate * y),
}
DTYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-x.astype(np.float32)))).astype(x.dtype)


def parse(text: str) -> ir.Model:
    """A model in ONNX's own textual form, with the definitions that it calls."""
    header = f'<ir_version: 11, opset_import: ["": 23, "{DOMAIN}": 1, "theirs": 1]>\n'
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    define(model)
    return model


def call(name: str, type_: str) -> ir.Model:
    """One call of a named function."""
    inputs = COMPUTES[name][0].format(t=type_)
    arguments = ", ".join(part.split()[1] for part in inputs.split(", "))
    return parse(f'g ({inputs}) => ({type_}[B,N,8] out) {{ ["call"] out = {DOMAIN}.{name}({arguments}) }}')


def feed(model: ir.Model, dtype: type = np.float32) -> Feed:
    generator = np.random.default_rng(0)
    shapes = {v.name: [SIZES.get(str(d), d) for d in v.shape or ()] for v in model.graph.inputs}
    return {str(n): generator.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}


def execute(model: ir.Model, inputs: Feed) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize("type_", ["float", "float16"])
@pytest.mark.parametrize("name", BY_RULES)
def test_onnx_runtime_runs_them(name: str, type_: str) -> None:
    model = call(name, type_)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    inputs = feed(model, DTYPES[type_])
    received, expected = execute(model, inputs), COMPUTES[name][1](*inputs.values())
    assert received.dtype == DTYPES[type_]
    np.testing.assert_allclose(received, expected, rtol=1e-5 if type_ == "float" else 2e-3, atol=2e-6)


@pytest.mark.parametrize("name", BY_RULES)
def test_they_are_of_any_type(name: str) -> None:
    """ONNX Runtime has no bf16 kernels on CPU; ONNX's own evaluator has."""
    model = call(name, "bfloat16")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    inputs = feed(model, ml_dtypes.bfloat16)
    received = np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)[0])
    assert received.dtype == ml_dtypes.bfloat16
    expected = COMPUTES[name][1](*inputs.values()).astype(np.float32)
    np.testing.assert_allclose(received.astype(np.float32), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", BY_RULES)
def test_shapes_are_inferred_through_them(name: str) -> None:
    """By ONNX, and by the symbolic inference that prepares other people's graphs."""
    model = call(name, "float16")
    dims = ["B", "N", 8]
    for out in (model.graph.outputs[0], model.graph[0].outputs[0]):
        out.shape = None
    symbolic = model.clone()
    infer_symbolic_shapes(symbolic)
    assert [getattr(d, "value", d) for d in symbolic.graph[0].outputs[0].shape or ()] == dims
    assert symbolic.graph[0].outputs[0].dtype == ir.DataType.FLOAT16
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True).graph.output[0]
    assert [d.dim_param or d.dim_value for d in inferred.type.tensor_type.shape.dim] == dims


def test_their_names_are_no_ops_of_onnx() -> None:
    ops = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert ops and not ops & set(NAMED_FUNCTIONS)
    assert {schema.domain for schema in onnx.defs.get_all_schemas_with_history()}.isdisjoint({DOMAIN})


def test_their_names_are_no_ops_of_tensorrt(tensorrt_rtx: object) -> None:
    """Its parser takes a built-in or a plugin before a function of that name, whatever the domain."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.supports_operator("LayerNormalization")
    assert not any(parser.supports_operator(name) for name in NAMED_FUNCTIONS)
    plugins = {creator.name for creator in trt.get_plugin_registry().all_creators}
    assert not plugins & set(NAMED_FUNCTIONS)


SPELLED = """g ({t}[B,N,8] x, {t}[B,1,8] scale, {t}[B,1,8] shift, {t}[B,1,8] gate, {t}[B,N,8] value)
    => ({t}[B,N,8] out) <{t}[8] w = {{{ones}}}, {t} one = {{{one}}}> {{ BODY }}"""
BODY = """
  n = LayerNormalization<epsilon=1e-6>(x, w)
  f = Add(one, scale)
  m = Mul(n, f)
  a = Add(m, shift)
  s = Sigmoid(a)
  z = Mul(a, s)
  v = Mul(z, value)
  r = Mul(gate, v)
  out = Add(x, r)
"""
CALLED = ["LayerNormalization", "MMDiTModulate", "MMDiTSwiGLU", "MMDiTGatedResidual"]
# The same in a local function: one is a Constant there, and the weight an input.
IN_FUNCTION = (
    SPELLED.replace("BODY", '["b"] out = theirs.Block(x, scale, shift, gate, value, w)')
    + """<domain: "theirs", opset_import: ["": 23]>
    Block (x, scale, shift, gate, value, w) => (out) {{ one = Constant<value = {t} {{{one}}}>() """
    + BODY
    + "}}"
)


def spelled(type_: str, *, in_function: bool = False) -> ir.Model:
    """All four, spelled out, with the types and shapes that rules need, also in a function."""
    one = {"float": "1", "float16": "15360"}[type_]  # ONNX writes fp16 as its bits
    text = IN_FUNCTION if in_function else SPELLED.replace("BODY", BODY)
    model = parse(text.format(t=type_, one=one, ones=",".join([one] * 8)))
    if in_function:
        flat = spelled(type_)
        values = {v.name: v for v in [*flat.graph.inputs, *flat.graph.initializers.values()]}
        values |= {v.name: v for node in flat.graph for v in node.outputs}
        (block,) = [f for f in model.functions.values() if f.domain == "theirs"]
        for value in [*block.inputs, *(v for node in block for v in node.outputs)]:
            value.type, value.shape = values[value.name].type, values[value.name].shape
        return model
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


@pytest.mark.parametrize("in_function", [False, True], ids=["main graph", "function"])
@pytest.mark.parametrize("type_", ["float", "float16"])
def test_rules_make_them_and_spelling_out_takes_them_back(type_: str, in_function: bool) -> None:
    """Bit for bit the same numbers each time."""
    model = spelled(type_, in_function=in_function)
    inputs = feed(model, DTYPES[type_])
    before = execute(model, inputs)
    assert [r.count for r in run(model, RULES)] == [1, 1, 1, 1]
    scope = next((f for f in model.functions.values() if f.domain == "theirs"), model.graph)
    assert [n.op_type for n in scope if n.op_type != "Constant"] == CALLED
    # SiLU became a part of SwiGLU: nothing calls it, and so it is not defined.
    assert {f.name for f in model.functions.values() if is_named_function(f)} == set(BY_RULES) - {"MMDiTSiLU"}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_array_equal(execute(model, inputs), before)
    assert [r.count for r in run(model, RULES, explain=True) if r.count or r.left] == []

    assert spelled_out.apply(model) == 3
    assert not any(is_named_function(f) for f in model.functions.values())
    made = [v for n in scope for v in n.outputs]
    assert all(v.type is not None and v.shape is not None for v in made)
    assert {v.dtype for v in made} == {model.graph.inputs[0].dtype}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_array_equal(execute(model, inputs), before)
    again = ir.to_proto(model)
    assert spelled_out.apply(model) == 0 and ir.to_proto(model) == again
    assert [r.count for r in run(model, RULES)] == [1, 1, 1, 1]  # what is spelled out is found again


def test_spelled_out_names_say_where_they_come_from() -> None:
    """As TensorRT names nodes of nested functions, so that engines' kernels are found either way."""
    model = call("MMDiTModulate", "float16")
    assert spelled_out.apply(model) == 1
    assert [n.name for n in model.graph] == ["call/one_like", "call/factor", "call/scaled", "call/shifted"]
    assert model.graph[0].attributes["value"].as_tensor().numpy() == np.float16(1)
    shapes = {n.name: [getattr(d, "value", d) for d in n.outputs[0].shape or ()] for n in model.graph}
    assert shapes["call/factor"] == ["B", 1, 8] and shapes["call/scaled"] == ["B", "N", 8]


def test_without_types_a_constant_stays_cast() -> None:
    """As in a function that is called with several types."""
    model = call("MMDiTModulate", "float")
    inputs = feed(model)
    before = execute(model, inputs)
    model.graph[0].outputs[0].type = None
    spelled_out.apply(model)
    assert [n.op_type for n in model.graph] == ["Constant", "CastLike", "Add", "Mul", "Add"]
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    np.testing.assert_array_equal(execute(model, inputs), before)


OTHERS = {
    "in our domain": (DOMAIN, ""),
    "in another domain": ("theirs", ""),
    "an overload": (DOMAIN, "second"),
}


@pytest.mark.parametrize("where", OTHERS)
def test_a_name_that_is_taken(where: str) -> None:
    """Somebody's function of our name is renamed, and computes what it did."""
    domain, overload = OTHERS[where]
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 11, opset_import: ["": 23, "{DOMAIN}": 1, "theirs": 1]>
            g (float[B,N,8] x) => (float[B,N,8] y, float[B,N,8] z) {{
              s = Sigmoid(x)
              y = Mul(x, s)
              z = theirs.Outer(x)
            }}
            <domain: "{domain}", opset_import: ["": 23]> MMDiTSiLU (x) => (y) {{ y = Neg(x) }}
            <domain: "theirs", opset_import: ["": 23, "{domain}": 1]> Outer (x) => (y)
              {{ y = {domain}.MMDiTSiLU(x) }}"""
        )
    )
    (other,) = [f for f in model.functions.values() if f.name == "MMDiTSiLU"]
    if overload:
        del model.functions[other.identifier()]
        other.overload = overload
        model.functions[other.identifier()] = other
        (outer,) = [f for f in model.functions.values() if f.name == "Outer"]
        outer[0].overload = overload
    inputs = feed(model)
    assert silu.apply(model) == 1
    assert {(f.domain, f.name) for f in model.functions.values()} == {
        (DOMAIN, "MMDiTSiLU"),
        (domain, "MMDiTSiLU_2"),
        ("theirs", "Outer"),
    }
    onnx.checker.check_model(ir.to_proto(model), full_check=not overload)
    y, z = ReferenceEvaluator(ir.to_proto(model)).run(None, inputs) if not overload else (None, None)
    if not overload:
        np.testing.assert_allclose(y, inputs["x"] * _sigmoid(inputs["x"]), rtol=1e-6)
        np.testing.assert_array_equal(z, -inputs["x"])
    before = ir.to_proto(model)
    assert silu.apply(model) == 0 and make_way(model) == 0 and ir.to_proto(model) == before


def test_our_own_definition_is_not_taken_for_somebodys() -> None:
    """Whatever its values and nodes are called, and whatever a reader of the file noted about types."""
    model = call("MMDiTModulate", "float")
    (function,) = model.functions.values()
    for i, node in enumerate(function):
        node.name = node.outputs[0].name = f"renamed_{i}"
    for value in function.inputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    assert make_way(model) == 0
    function[0].attributes["value_float"] = ir.AttrFloat32("value_float", 2.0)
    assert make_way(model) == 1


def test_definitions_take_the_models_opset() -> None:
    """A function must not import another version of ONNX's ops than the model has."""
    model = call("MMDiTSiLU", "float")
    model.opset_imports[""] = 24
    model.functions.clear()
    assert define(model) == 1
    (function,) = model.functions.values()
    assert function.opset_imports[""] == 24 and definition("MMDiTSiLU").opset_imports[""] == 23
    execute(model, feed(model))


def test_what_nobody_calls_is_dropped() -> None:
    model = call("MMDiTSwiGLU", "float")
    model.functions[DOMAIN, "MMDiTSiLU", ""] = definition("MMDiTSiLU").clone()
    assert define(model) == 0
    assert {f.name for f in model.functions.values()} == {"MMDiTSwiGLU"}
