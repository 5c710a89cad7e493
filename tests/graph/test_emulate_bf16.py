"""bf16 on a runtime without bf16 kernels: each op in fp32, its result rounded through bf16."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from mmdit_deploy.graph.lower.emulate_bf16 import emulate_bf16
from mmdit_deploy.runtime import open_session, run_session

BODY = """
    p = MatMul(x, w)
    y = Add(p, b)
"""
GRAPH = """<ir_version: 11, opset_import: ["": 23, "d": 1]>
g (bfloat16[N,4] x, bfloat16[4,3] w, bfloat16[3] b) => (bfloat16[N,3] y) { %s }
"""
FUNCTION = """
<domain: "d", opset_import: ["": 23]>
Dense (x, w, b) => (y) <bfloat16[N,3] p, bfloat16[N,3] y> { %s }
"""
GRAPHS = {"flat": GRAPH % BODY, "in a function": GRAPH % "y = d.Dense(x, w, b)" + FUNCTION % BODY}


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def typed(model: ir.Model) -> ir.Model:
    """Give function bodies the types that a traced function has: the textual form has none for inputs."""
    for function in model.functions.values():
        values = [*function.inputs, *(out for node in function for out in node.outputs)]
        for value in values:
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
    return model


def inputs() -> dict[str, Tensor]:
    """Multiples of 1/16 below 8: every sum is exact in fp32, and most need rounding in bf16."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return (torch.randint(-127, 128, shape, generator=generator) / 16).bfloat16()

    return {"x": make(50, 4), "w": make(4, 3), "b": make(3)}


def execute(model: ir.Model, feed: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    session = open_session(ir.to_proto(model).SerializeToString(), "ort-cpu")
    return run_session(session, feed, [("y", dtype, (50, 3))])["y"]


@pytest.mark.parametrize("name", GRAPHS)
def test_each_op_is_rounded_as_torch_rounds_it(name: str) -> None:
    model = typed(parse(GRAPHS[name]))
    assert emulate_bf16.apply(model) > 0
    feed = inputs()
    x, w, b = (feed[n].float() for n in ("x", "w", "b"))
    product = (x @ w).bfloat16()
    expected = (product.float() + b).bfloat16()
    assert not torch.equal(expected, (x @ w + b).bfloat16())  # the rounding in between is seen
    assert torch.equal(execute(model, feed), expected)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_second_run_changes_nothing(name: str) -> None:
    model = typed(parse(GRAPHS[name]))
    emulate_bf16.apply(model)
    before = ir.to_proto(model)
    assert emulate_bf16.apply(model) == 0
    assert ir.to_proto(model) == before


def test_data_that_only_moves_is_not_rounded_again() -> None:
    text = GRAPH % "t = Transpose<perm=[1,0]>(w)  u = Transpose<perm=[1,0]>(t)  p = MatMul(x, u)  y = Add(p, b)"
    model = parse(text)
    emulate_bf16.apply(model)
    roundings = [
        node for node in model.graph if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.BFLOAT16
    ]
    assert len(roundings) == 3  # after MatMul and Add, and at the graph's edge


def test_what_is_fp32_stays_fp32() -> None:
    """A near miss: a graph in fp32 is not touched, and neither is an fp32 output of a bf16 graph."""
    model = parse(GRAPHS["flat"].replace("bfloat16", "float"))
    assert emulate_bf16.apply(model) == 0
    mixed = parse(GRAPH.replace("bfloat16[N,3] y", "float[N,3] y") % "p = MatMul(x, w) q = Add(p, b) y = Cast<to=1>(q)")
    emulate_bf16.apply(mixed)
    assert mixed.graph.outputs[0].dtype == ir.DataType.FLOAT
    received = execute(mixed, inputs(), torch.float32)
    assert torch.equal(received, execute(_emulated(GRAPHS["flat"]), inputs()).float())


def _emulated(text: str) -> ir.Model:
    model = parse(text)
    emulate_bf16.apply(model)
    return model
