"""More than a dozen kinds of wrong model, each rejected at every precision, by verification as it ships."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import onnx
import pytest

from mmdit_deploy.errors import GraphError
from mmdit_deploy.spec import PRECISIONS, QUANTIZED

# Of `FAULTS` in faults.py: those of SD3 that none of fp32, fp16 and bf16 is blind to, where test_faults.py plants them.
KINDS = (
    "scale and shift swapped in the weights",
    "scale and shift of the MLP swapped in the weights",
    "scale and shift swapped in the graph",
    "order of the last text modulation in the weights",
    "order of the final modulation in the graph",
    "Q and K exchanged",
    "timestep without its factor of 1000",
    "rows and columns of img_ids exchanged",
    "img_ids in reverse order",
    "gate of the attention dropped",
    "gate of the text MLP dropped",
    "streams exchanged",
    "exponent bit flipped at the end",
    "pooled text ignored",
    "blocks exchanged",
    "another seed",
)
REMAINING = [name for name in (*PRECISIONS, *QUANTIZED) if name not in ("fp32", "bf16")]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_that_is_right_passes(copy_of: Callable[[str], Any], name: str) -> None:
    verdict = copy_of(name).verify(whole=False)
    assert verdict.passed, verdict.first_failure
    assert {check.name for check in verdict.checks if check.level == "nodes"} >= {"conditioning", "blocks.0", "final"}


# Each kind at one of the quantized precisions; all of them are below.
SAMPLE = [(kind, QUANTIZED[i % len(QUANTIZED)]) for i, kind in enumerate(KINDS)]
REST = [(kind, name) for kind in KINDS for name in QUANTIZED if (kind, name) not in SAMPLE]


@pytest.mark.parametrize(("kind", "name"), [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.soak) for one in REST)])
def test_a_mutant_is_rejected_where_it_is_quantized(
    copy_of: Callable[[str], Any], plant: Callable[[Any, str], str], kind: str, name: str
) -> None:
    copy = copy_of(name)
    first = plant(copy, kind)
    verdict = copy.verify(whole=False)
    assert not verdict.passed
    # Whatever its own tolerance hides, the eager model as planned shows.
    wrong = [check.name for check in verdict.checks if not check.passed and check.level in ("local", "nodes")]
    assert first in wrong, (first, wrong)


def change_nodes(op: str, change: Callable[[onnx.NodeProto], None]) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        for function in model.functions:
            for node in function.node:
                if node.op_type == op:
                    change(node)

    return apply


def set_epsilon(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-5


@pytest.mark.parametrize("name", ["fp32", "bf16", *(pytest.param(n, marks=pytest.mark.soak) for n in REMAINING)])
@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("RMSNormalization", set_epsilon, r"must have an epsilon of 1e-06"),
        ("LayerNormalization", set_epsilon, r"must have an epsilon of 1e-06"),
        ("Gelu", lambda node: node.ClearField("attribute"), r"must be tanh's approximation"),
    ],
)
def test_what_no_tolerance_shows_is_refused(
    copy_of: Callable[[str], Any], name: str, op: str, change: Callable[[onnx.NodeProto], None], message: str
) -> None:
    """An epsilon of 1e-5, and GELU by erf, move a block by less than 16 bits round it by."""
    copy = copy_of(name)
    copy.edit_graph(change_nodes(op, change))
    with pytest.raises(GraphError, match=re.compile(message)):
        copy.verify(whole=False)
