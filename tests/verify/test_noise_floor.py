"""The noise floor is measured, kept, and what errors are compared with."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.errors import MachineError, UsageError
from mmdit_deploy.model import calls
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import Case, Check, Errors, compare
from mmdit_deploy.verify.noise_floor import Measurement, Way, floor_ways

# Two timesteps of one shape, one of another.
CASES = (Case(1, 3, 5, 7, 999.0), Case(1, 3, 5, 7, 3.0), Case(2, 4, 4, 8, 500.25))


@pytest.mark.parametrize(("name", "least", "most"), [("fp16", 5e-5, 2e-3), ("bf16", 4e-4, 2e-2)])
def test_the_floor_of_every_call_is_that_of_its_type(
    copy_of: Callable[[str], Any], name: str, least: float, most: float
) -> None:
    verdict = copy_of(name).verify(CASES, noise_floor="auto")
    (floor,) = verdict.noise_floors
    assert floor.what == f"eager in {precision(name).dtype}" and floor.cases == 1
    assert set(floor.calls) == {c.name for c in verdict.checks if c.level == "local"}
    assert all(least < rel_l2 < most for rel_l2 in floor.calls.values())
    assert least < floor.output < 5 * most
    for check in verdict.checks:
        assert check.times_floor is not None and 0.1 < check.times_floor < 6, check


def test_a_fault_is_many_times_the_floor(planted: Callable[[str, str], tuple[Any, str]]) -> None:
    copy, first = planted("gate of the attention dropped", "fp16")
    verdict = copy.verify(CASES, noise_floor="auto")
    assert verdict.first_failure.name == first and verdict.first_failure.times_floor > 20


def test_the_floor_is_kept_for_those_without_the_weights(healthy: Callable[[str], Path]) -> None:
    verdict = verify_bundle(healthy("fp16"))
    (floor,) = verdict.noise_floors
    assert floor.what == "eager in float16" and floor.cases == 1
    assert all(0.1 < c.times_floor < 6 for c in verdict.checks if c.level in ("output", "engine"))
    assert verify_bundle(healthy("fp32")).noise_floors == ()


def test_it_is_measured_on_request_and_where_it_can_be(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp16")
    assert copy.verify(CASES[:1], noise_floor="none").noise_floors == ()
    (floor,) = copy.verify(CASES, noise_floor="dtype").noise_floors
    assert floor.cases == 3
    with pytest.raises(UsageError, match="no noise in its own type"):
        copy_of("fp32").verify(CASES, noise_floor="dtype")
    with pytest.raises(UsageError, match="one of auto, dtype, compile, none"):
        copy.verify(CASES, noise_floor="loud")


def test_what_a_request_measures() -> None:
    def ways(request: Any, name: str) -> list[tuple[str, list[int]]]:
        return [(way.what, few) for way, few in floor_ways(request, precision(name), CASES)]

    assert ways("auto", "fp32") == []
    # The price of a quantization is seen beside the noise of what is not quantized.
    assert ways("auto", "fp8") == ways("auto", "fp16") == [("eager in float16", [0])]
    assert ways("dtype", "bf16") == [("eager in bfloat16", [0, 1, 2])]
    assert ways("compile", "fp32") == [("torch.compile in float32", [0])]
    assert ways("compile", "bf16") == [
        ("eager in bfloat16", [0]),
        ("torch.compile in float32", [0]),
        ("torch.compile in bfloat16", [0]),
    ]
    assert floor_ways("auto", precision("fp16"), ()) == []


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_torch_compile_differs_from_eager_in_the_last_bits(tiny_spec: ModelSpec) -> None:
    call = next(c for c in calls(tiny_spec) if c.path == "blocks.1")
    eager = EagerCalls(tiny_spec, RandomWeights(3)).load(call)
    sizes = {"batch": 2, "img_tokens": 15, "txt_tokens": 7}
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(t.shape(sizes), generator=generator) for t in call.kind.inputs]
    made = Way(torch.float32, compiled=True).of(call, eager)(inputs)
    errors = compare(made[0], eager(inputs)[0])
    assert 0 < errors.rel_l2 < 2e-6


def test_without_a_compiler_there_is_a_reason(tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Callable[..., Any]:
        def run(*_: object) -> None:
            raise torch._dynamo.exc.BackendCompilerFailed(run, RuntimeError("no g++"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    call = calls(tiny_spec)[2]
    eager = EagerCalls(tiny_spec, RandomWeights(3)).load(call)
    with pytest.raises(MachineError, match=r"g\+\+"):
        Way(torch.float32, compiled=True).of(call, eager)([torch.zeros(1, 2, tiny_spec.txt_dim)])


def check(case: Case, level: Any = "local") -> Check:
    return Check("blocks.0", level, case, Errors(1.0, 1e-3, 0.0), True, True)


def test_a_check_on_another_case_has_the_largest_floor_of_its_call() -> None:
    measured = Measurement(
        "eager in float16", (0, 2), {"blocks.0": {0: 1e-4, 2: 2e-4}}, {"blocks.0": {0: 1e-3, 2: 0.0}}
    )
    own, other, last = measured.attach([check(case) for case in CASES], CASES)
    assert (own.floor, other.floor, last.floor) == (1e-4, 2e-4, 2e-4)
    assert own.times_floor == pytest.approx(10)
    chained = measured.attach([check(case, "cumulative") for case in CASES], CASES)
    assert [c.floor for c in chained] == [1e-3, 1e-3, None]  # nothing is a multiple of zero
    assert dataclasses.replace(own, floor=None).times_floor is None


def test_a_floor_that_is_not_finite_is_no_floor() -> None:
    """What overflows in the eager model's own fp16 has nothing to be compared with, and the record says so."""
    measured = Measurement("eager in float16", (0,), {"blocks.0": {0: math.nan}}, {"sample": {0: math.nan}})
    assert measured.attach([check(CASES[0])], CASES)[0].floor is None
    assert math.isnan(measured.record().output) and math.isnan(measured.record().calls["blocks.0"])
    again = Measurement.from_json(measured.to_json())
    assert again.what == measured.what and math.isnan(again.alone["blocks.0"][0])
