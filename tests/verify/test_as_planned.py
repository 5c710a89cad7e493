"""A quantized engine beside the eager model as planned: what is compared with what, and what is said of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.eager.planned import PlannedCall
from mmdit_deploy.export import ExportRequest
from mmdit_deploy.model import calls
from mmdit_deploy.report.words import breaches
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verify import TOLERANCES
from mmdit_deploy.verify.exposed import Body
from mmdit_deploy.verify.nodes import Matching, compare_nodes
from traces import Traces

RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(1, 8, 16)}
UP, DOWN = (rf"transformer_blocks\.1\.ff\.net\.{i}\.weight" for i in (r"0\.proj", "2"))


class TooLarge(RandomWeights):
    """What the last MLP hands on inside is far beyond fp16's range, and what it gives is not."""

    def part(self, part: Part) -> Tensor:
        factor = 3e5 if re.fullmatch(UP, part.key) else 0.2 if re.fullmatch(DOWN, part.key) else 1.0
        return super().part(part) * factor


@pytest.fixture(scope="module", autouse=True)
def _traced(traces: Traces, tiny_spec: ModelSpec) -> Iterator[None]:
    with traces.within(tiny_spec):
        yield


@pytest.mark.parametrize("name", ["fp8", "int8"])  # with a scale per tensor, and per token, found while it runs
def test_what_is_quantized_from_fp32_is_compared_with_the_same(
    quick_export: Callable[..., Any], tiny_spec: ModelSpec, tmp_path: Path, name: str
) -> None:
    compute = precision(name, "fp16")
    source, out = TooLarge(3), tmp_path / "bundle"
    result = quick_export(ExportRequest(tiny_spec, source, compute, out=out, ranges=RANGES, fp16_plan="auto"))
    (verdict,) = result.verdicts
    assert verdict.passed
    model = onnx.load(next(result.path.glob("model.ort*.onnx")), load_external_data=False)
    body = Body.of(model, "blocks.1")
    assert body.type_of("gelu") == onnx.TensorProto.FLOAT
    # Nothing hides behind what the quantized layer would make of infinity.
    inside = [check for check in verdict.checks if check.level == "nodes"]
    assert inside and all(check.errors.rel_l2 < TOLERANCES["fp16"].max_rel_l2 for check in inside)


def test_a_wider_bound_and_the_value_are_told(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp8")
    copy.edit_weights(lambda tensors: tensors["blocks.0.img.mlp.up.weight_scale"].mul_(1.25))
    verdict = copy.verify(whole=False)
    off = next(check for check in verdict.checks if check.level == "nodes" and not check.passed)
    bound = verdict.tolerance_of(off)
    assert (off.name, off.value) == ("blocks.0", "linear_3")
    assert off.errors.rel_l2 > bound["max_rel_l2"] == off.bounds["max_rel_l2"]
    assert off.bounds["max_rel_l2"] > verdict.tolerances["fp16"]["max_rel_l2"]
    assert breaches(off, bound).startswith("linear_3: rel-L2 ")
    record = next(c for c in verdict.to_json()["checks"] if c.get("bounds"))
    assert record["value"] == off.value and record["bounds"] == off.bounds


def test_an_output_of_another_shape_is_out_of_tolerance(
    copy_of: Callable[[str], Any], programs_for: Callable[..., Mapping[str, Any]], tiny_spec: ModelSpec
) -> None:
    engine = copy_of("fp8").engine()
    call = next(c for c in calls(engine.spec) if c.path == "txt_embed")
    matching = Matching(programs_for(tiny_spec, torch.float16)[call.kind.function], Body.of(engine.graph, call.path))
    width = engine.spec.txt_dim
    weights = EagerCalls(engine.spec, RandomWeights(3)).weights(call)
    planned = PlannedCall(call.path, matching.program, weights, engine.plan)
    given = {t.name: torch.ones(1, 2, width) for t in call.kind.inputs}
    name = next(matching.values[n] for n in matching.values if n.name in matching.program.outputs)
    (compared,) = compare_nodes(
        matching, planned, given, {name: torch.ones(1, 1)}, torch.float16, (), TOLERANCES["fp16"]
    )
    assert not compared.passed and math.isinf(compared.errors.rel_l2)
