"""Joined modulations are read back: whatever is joined wrongly is refused, by the name of the call."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.modulations import check_modulations
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec

CALLS = ("modulations.0.img", "modulations.0.txt", "modulations.1.img", "modulations.1.txt", "final_modulation")


@pytest.fixture
def graphs(tiny_spec: ModelSpec, graphs_of: Callable[..., Graphs]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A lowered graph to break, and the standard one."""
    made = graphs_of(tiny_spec, "fp16", dialects=("trt",))
    lowered = onnx.ModelProto()
    lowered.CopyFrom(made.of("trt"))
    return lowered, made.standard


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def swap_outputs(model: onnx.ModelProto) -> None:
    """Of the first block's image and the second's, which have as many rows."""
    names = [n for n in model.graph.node for n in n.output]
    first, second = "modulations.0.img", "modulations.1.img"
    assert first in names and second in names
    for n in model.graph.node:
        n.output[:] = [{first: second, second: first}.get(name, name) for name in n.output]


def shift(model: onnx.ModelProto, which: int) -> None:
    """The joined weight (1) or bias (2) by two bytes."""
    name = node(model, "Gemm").input[which]
    tensor = next(i for i in model.graph.initializer if i.name == name)
    offset = next(entry for entry in tensor.external_data if entry.key == "offset")
    offset.value = str(int(offset.value) + 2)


def exchange_counts(model: onnx.ModelProto) -> None:
    name = node(model, "Split").input[1]
    counts = next(n for n in model.graph.node if n.output[0] == name).attribute[0].ints
    counts[0], counts[-1] = counts[-1], counts[0]


def other_input(model: onnx.ModelProto) -> None:
    node(model, "Gemm").input[0] = "pooled_projections"


def drop_a_part(model: onnx.ModelProto) -> None:
    for n in model.graph.node:
        n.output[:] = ["unused" if name == CALLS[2] else name for name in n.output]


def test_a_lowered_graph_is_right(graphs: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    lowered, standard = graphs
    assert not any(n.name in CALLS for n in lowered.graph.node) and node(lowered, "Gemm")
    assert check_modulations(lowered, standard, CALLS) == 5
    assert check_modulations(standard, standard, CALLS) == 5  # also calls that are still apart


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (swap_outputs, CALLS[0]),
        (lambda model: shift(model, 1), CALLS[0]),
        (lambda model: shift(model, 2), CALLS[0]),
        (exchange_counts, CALLS[0]),
        (other_input, CALLS[0]),
        (drop_a_part, CALLS[2]),
    ],
)
def test_what_is_joined_wrongly_is_refused(
    graphs: tuple[onnx.ModelProto, onnx.ModelProto], fault: Callable[[onnx.ModelProto], None], named: str
) -> None:
    lowered, standard = graphs
    fault(lowered)
    with pytest.raises(GraphError, match="its own rows of the weights file") as caught:
        check_modulations(lowered, standard, CALLS)
    assert caught.value.rule.startswith(named)
