"""A call's operators compute what the eager call computes, under the names that the graph's function has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.families import preset
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.records import Case

# Tracing is dear: the other families' operators are those that calibration's tests compare with module hooks.
DEAR = ("sd3.5-medium", "flux2-klein-4b", "qwen-image-edit-2511")
PRESETS = ("flux1-dev", *(pytest.param(name, marks=pytest.mark.soak) for name in DEAR))


def tiny(name: str) -> ModelSpec:
    spec = preset(name)
    dual = tuple(i for i in spec.dual_attention_blocks if i < 1)
    single = min(spec.single_depth, 1)
    return dataclasses.replace(spec, num_heads=2, depth=2, single_depth=single, dual_attention_blocks=dual)


@pytest.mark.parametrize("name", PRESETS)
def test_operators_compute_the_eager_call_to_the_bit(name: str) -> None:
    spec = tiny(name)
    contract = Contract.of(spec, precision("fp32"))
    values = case_inputs(Case(2, 4, 6, 5, timestep=500.25), contract, spec)
    eager = EagerCalls(spec, RandomWeights(3))
    programs = programs_of(calls(spec), torch.float16)
    for call in calls(spec):
        given = dict(zip([t.name for t in call.kind.inputs], [values[n] for n in call.inputs], strict=True))
        expected = eager.load(call)(list(given.values()))
        made = programs[call.kind.function].run(given, eager.weights(call))
        assert [t.dtype for t in made] == [t.dtype for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)), call.path
        values.update(zip(call.outputs, made, strict=True))
    assert len(programs) > 5


def test_what_a_tap_returns_is_what_the_next_operator_reads() -> None:
    spec = tiny("sd3.5-medium")
    call = next(c for c in calls(spec) if c.path == "txt_embed")
    program, weights = Program(call.kind, torch.float16), EagerCalls(spec, RandomWeights(3)).weights(call)
    text = torch.randn(2, 5, spec.txt_dim)
    seen: list[str] = []

    def halve(node: torch.fx.Node, value: torch.Tensor) -> torch.Tensor:
        seen.append(node.name)
        return value / 2

    (plain,) = program.run({"encoder_hidden_states": text}, weights)
    (halved,) = program.run({"encoder_hidden_states": text}, weights, tap=halve)
    (replaced,) = program.run({"encoder_hidden_states": text}, weights, replace=lambda node, args: args[0] * 0)
    assert seen == ["linear"] == list(program.outputs)
    assert torch.equal(halved, plain / 2)
    assert not replaced.any()
