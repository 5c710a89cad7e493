"""Dims of traced functions: each size has one name, and the name says the size that the traced op really has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir
import pytest
import torch

from mmdit_deploy.contract import AXES, TensorSpec
from mmdit_deploy.graph.axis_names import name_axes
from mmdit_deploy.graph.trace import trace
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec


def renamed(dims: list[str], inputs: list[tuple[list[str], tuple[str, ...]]]) -> list[int | str]:
    """What becomes of dims, where inputs with these symbols have these axes."""
    graph_inputs = [ir.Value(name=f"x{i}", shape=ir.Shape(symbols)) for i, (symbols, _) in enumerate(inputs)]
    node = ir.node("Identity", [graph_inputs[0]])
    node.outputs[0].shape = ir.Shape(dims)
    graph = ir.Graph(graph_inputs, node.outputs, nodes=[node])
    name_axes(graph, [TensorSpec(f"x{i}", axes, "compute") for i, (_, axes) in enumerate(inputs)])
    return [d if isinstance(d, int) else str(d) for d in node.outputs[0].shape or ()]


STREAMS = [(["s1", "s2"], ("batch", "img_tokens")), (["s1", "s9"], ("batch", "txt_tokens"))]


@pytest.mark.parametrize(
    ("dim", "name"),
    [
        ("s2 + s9", "img_tokens + txt_tokens"),
        ("s9 + s2", "img_tokens + txt_tokens"),
        ("s2", "img_tokens"),
        ("(2*s1//2)", "batch"),
        ("2*s1", "batch + batch"),
        ("s2 - s2 + 7", 7),
        ("3*s2 - 2*s2", "img_tokens"),
    ],
)
def test_a_size_has_one_name(dim: str, name: int | str) -> None:
    assert renamed([dim], STREAMS) == [name]


def test_a_symbol_may_stand_for_a_sum() -> None:
    inputs = [(["s4"], ("batch + batch",)), (["s5"], ("img_tokens + txt_tokens",))]
    assert renamed(["s4", "(s4//2)", "s4 - (s4//2)", "s5"], inputs) == [
        "batch + batch",
        "batch",
        "batch",
        "img_tokens + txt_tokens",
    ]


def test_every_dim_of_a_block_is_an_axis_or_a_number(tiny_families: Mapping[str, ModelSpec]) -> None:
    """Also where modulations are those of the batch twice."""
    edit = dataclasses.replace(tiny_families["qwen-image"], still_references=True)
    kind = next(call.kind for call in calls(edit) if call.kind.function == "MMDiTJointBlock")
    known = {*AXES, "img_tokens + txt_tokens", "batch + batch"}
    function = trace(kind, torch.float32)
    dims = {str(d) for node in function for out in node.outputs for d in out.shape or () if not isinstance(d, int)}
    assert dims <= known and {"img_tokens + txt_tokens", "batch", "batch + batch"} & dims
