"""A graph beside another is compared once per kind of call: enough to find what is wrong in it, and whose it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.errors import GraphError
from mmdit_deploy.verify import Case, Verdict, verify_against_weights

SEED = 3  # of the healthy bundles
CASES = (Case(1, 4, 4, 8, timestep=999.0), Case(2, 3, 5, 7, timestep=500.25))


@pytest.fixture
def pair(healthy: Callable[[str], Path], copy_of: Callable[[str], Any]) -> tuple[Any, Any]:
    """A healthy fp32 bundle, not to be changed, and a copy of it, to break."""
    copy = copy_of("fp32")
    return dataclasses.replace(copy, path=healthy("fp32")), copy


def verify(first: Any, beside: Any) -> tuple[Verdict, ...]:
    options = {"whole": False}  # what is stepped through must be enough: an engine may not run here
    return verify_against_weights(
        first.engine(**options), RandomWeights(SEED), CASES, beside=(beside.engine(**options),)
    )


def test_a_healthy_one_beside_passes_with_one_call_of_each_kind(pair: tuple[Any, Any]) -> None:
    first, beside = verify(*pair)
    assert first.passed and beside.passed
    assert "11 calls one by one, 2 cases" in first.executed[0]
    assert "one call of each of 8 kinds, 2 cases" in beside.executed[0]
    assert {check.level for check in beside.checks} == {"local"} and all(check.binding for check in beside.checks)
    assert [check.name for check in beside.checks][::2] == [
        "conditioning", "img_embed", "txt_embed", "modulations.0.img", "blocks.0", "modulations.1.txt", "blocks.1",
        "final",
    ]  # fmt: skip
    # final_modulation is of the kind of modulations.1.txt, and the others of that of modulations.0.img
    assert {check.name for check in first.checks} - {check.name for check in beside.checks} == {
        "modulations.0.txt", "modulations.1.img", "final_modulation", "sample"
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        "scale and shift swapped in the graph",
        "order of the last text modulation in the graph",
        "order of the final modulation in the graph",
        "timestep without its factor of 1000",
        "rows and columns of img_ids exchanged",
        "gate of the text MLP dropped",
    ],
)
@pytest.mark.parametrize("broken_first", [False, True])
def test_a_fault_is_found_in_the_graph_that_has_it(
    pair: tuple[Any, Any], plant: Callable[[Any, str], str], case: str, broken_first: bool
) -> None:
    good, bad = pair
    call = plant(bad, case)
    verdicts = verify(bad, good) if broken_first else verify(good, bad)
    wrong, right = verdicts if broken_first else reversed(verdicts)
    assert right.passed and not wrong.passed
    failure = wrong.first_failure
    assert failure is not None and (failure.name, failure.level) == (call, "local")


def test_a_variant_of_the_graph_beside_is_compared_too(
    healthy: Callable[[str], Path], copy_of: Callable[..., Any]
) -> None:
    """Calls of one kind may call functions of their own: what a plan leaves out, or keeps in fp32."""
    copy = copy_of("fp8")
    good = dataclasses.replace(copy, path=healthy("fp8"))

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == "modulations.1.img")
        own = model.functions.add()
        own.CopyFrom(next(f for f in model.functions if f.name == node.op_type))
        own.name = node.op_type = f"{own.name}_variant"
        last = next(n for n in own.node if own.output[0] in n.output)
        last.output[list(last.output).index(own.output[0])] = "before"
        own.node.append(onnx.helper.make_node("Neg", ["before"], [own.output[0]]))

    copy.edit_graph(change)
    right, wrong = verify(good, copy)
    assert right.passed and "one call of each of 9 kinds" in wrong.executed[0]
    failed = {(check.name, check.level) for check in wrong.checks if not check.passed}
    assert failed == {("modulations.1.img", "local"), ("modulations.1.img", "nodes")}


def test_a_miswired_graph_beside_is_refused(pair: tuple[Any, Any]) -> None:
    """A call of a kind that was compared already may read what is another's: that is looked at in the graph."""

    def miswire(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.name == "blocks.1").input[2] = "modulations.0.img"

    good, bad = pair
    bad.edit_graph(miswire)
    with pytest.raises(GraphError, match=r"blocks\.1 must read modulations\.1\.img"):
        verify(good, bad)
