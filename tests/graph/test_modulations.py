"""Joined modulations are read back: whatever is joined wrongly is refused, by the name of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
import pytest

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.modulations import check_modulations
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.spec import ModelSpec

# Of SD3 and of FLUX.2, whose modulations have no biases and are for all blocks. The first two have as many rows.
CALLS = {
    "sd3": ("modulations.0.img", "modulations.1.img", "modulations.0.txt", "modulations.1.txt", "final_modulation"),
    "flux2": ("shared_modulation.img", "shared_modulation.txt", "shared_modulation.single", "final_modulation"),
}


@dataclass(frozen=True)
class Lowered:
    """A lowered graph to break, the standard one, and the modulations in them."""

    lowered: onnx.ModelProto
    standard: onnx.ModelProto
    calls: tuple[str, ...]

    def check(self) -> int:
        return check_modulations(self.lowered, self.standard, self.calls)


@pytest.fixture
def graphs_in(
    tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec], graphs_of: Callable[..., Graphs]
) -> Callable[[str], Lowered]:
    """The graphs of a family's tiny model."""

    def make(family: str) -> Lowered:
        made = graphs_of({"sd3": tiny_spec, **tiny_families}[family], "fp16", dialects=("trt",))
        lowered = onnx.ModelProto()
        lowered.CopyFrom(made.of("trt"))
        return Lowered(lowered, made.standard, CALLS[family])

    return make


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def swap_outputs(graphs: Lowered) -> None:
    """Of the first two, which have as many rows."""
    first, second, *_ = graphs.calls
    for n in graphs.lowered.graph.node:
        n.output[:] = [{first: second, second: first}.get(name, name) for name in n.output]


def shift(graphs: Lowered, which: int) -> None:
    """The joined weight (1) or bias (2) by two bytes."""
    name = node(graphs.lowered, "Gemm").input[which]
    tensor = next(i for i in graphs.lowered.graph.initializer if i.name == name)
    offset = next(entry for entry in tensor.external_data if entry.key == "offset")
    offset.value = str(int(offset.value) + 2)


def shift_by_a_row(graphs: Lowered) -> None:
    """The joined weight by one row of the file, which is a row of the modulation before, or of something else."""
    name = node(graphs.lowered, "Gemm").input[1]
    tensor = next(i for i in graphs.lowered.graph.initializer if i.name == name)
    entries = {entry.key: entry for entry in tensor.external_data}
    entries["offset"].value = str(int(entries["offset"].value) - int(entries["length"].value) // tensor.dims[0])


def exchange_counts(graphs: Lowered) -> None:
    name = node(graphs.lowered, "Split").input[1]
    counts = next(n for n in graphs.lowered.graph.node if n.output[0] == name).attribute[0].ints
    counts[0], counts[-1] = counts[-1], counts[0]


def other_input(graphs: Lowered) -> None:
    node(graphs.lowered, "Gemm").input[0] = "hidden_states"


def drop_a_part(graphs: Lowered) -> None:
    for n in graphs.lowered.graph.node:
        n.output[:] = ["unused" if name == graphs.calls[1] else name for name in n.output]


@pytest.mark.parametrize("family", CALLS)
def test_a_lowered_graph_is_right(graphs_in: Callable[[str], Lowered], family: str) -> None:
    graphs = graphs_in(family)
    assert not any(n.name in graphs.calls for n in graphs.lowered.graph.node)
    assert len(node(graphs.lowered, "Gemm").input) == {"sd3": 3, "flux2": 2}[family]
    assert graphs.check() == len(graphs.calls)
    apart = check_modulations(graphs.standard, graphs.standard, graphs.calls)
    assert apart == len(graphs.calls)  # also calls that are not joined


FAULTS: dict[str, tuple[Callable[[Lowered], None], int]] = {
    "outputs exchanged": (swap_outputs, 0),
    "weights two bytes on": (lambda graphs: shift(graphs, 1), 0),
    "weights one row back": (shift_by_a_row, 0),
    "biases two bytes on": (lambda graphs: shift(graphs, 2), 0),
    "rows of the first and the last exchanged": (exchange_counts, 0),
    "another input": (other_input, 0),
    "a part dropped": (drop_a_part, 1),
}


@pytest.mark.parametrize(
    ("family", "fault"),
    [(family, fault) for family in CALLS for fault in FAULTS if (family, fault) != ("flux2", "biases two bytes on")],
)
def test_what_is_joined_wrongly_is_refused(graphs_in: Callable[[str], Lowered], family: str, fault: str) -> None:
    graphs, (change, named) = graphs_in(family), FAULTS[fault]
    change(graphs)
    with pytest.raises(GraphError, match="its own rows of the weights file") as caught:
        graphs.check()
    assert caught.value.rule.startswith(graphs.calls[named])
