"""The figures of a comparison, and the bounds on them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit_deploy.verify import TOLERANCES, Case, Check, Errors, Verdict, compare, within
from mmdit_deploy.verify.tolerances import Tolerance

CASE = Case(1, 2, 2, 1, 500.0)


def test_known_values() -> None:
    errors = compare(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    assert errors.cosine == pytest.approx(24 / 25)
    assert errors.rel_l2 == pytest.approx(math.sqrt(2) / 5)
    assert (errors.max_abs, errors.nonfinite) == (1.0, 0)
    assert compare(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).cosine == 0.0
    assert compare(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])).cosine == pytest.approx(-1.0)


def test_equal_tensors_are_within_every_tolerance() -> None:
    x = torch.linspace(-3, 5, 1000)
    assert compare(x, x) == Errors(pytest.approx(1.0), 0.0, 0.0)
    assert all(within(compare(x, x), tolerance) for tolerance in TOLERANCES.values())


def test_cosine_alone_would_miss_a_scale() -> None:
    x = torch.linspace(-3, 5, 1000)
    errors = compare(1.1 * x, x)
    assert errors.cosine > 0.9999999 and errors.rel_l2 == pytest.approx(0.1)
    kept = {name for name, tolerance in TOLERANCES.items() if within(errors, tolerance)}
    assert kept == {"fp4", "w4a16"}  # a tenth is what 4 bits round by


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_are_counted_and_never_within(bad: float, dtype: torch.dtype) -> None:
    received = torch.tensor([1.0, bad, 2.0, bad], dtype=dtype)
    errors = compare(received, torch.tensor([1.0, bad, 2.0, bad]))  # not even where the reference has them too
    assert errors.nonfinite == 2
    assert math.isnan(errors.rel_l2) and math.isnan(errors.cosine)
    assert not within(errors, Tolerance(-1.0, math.inf, "anything goes"))


def test_a_reference_that_is_not_finite_is_never_matched() -> None:
    errors = compare(torch.ones(3), torch.tensor([1.0, math.nan, 1.0]))
    assert not any(within(errors, tolerance) for tolerance in TOLERANCES.values())


def test_a_zero_reference() -> None:
    zeros = torch.zeros(4)
    assert compare(zeros, zeros) == Errors(1.0, 0.0, 0.0)
    errors = compare(torch.tensor([0.0, 0.0, 1e-30, 0.0]), zeros)
    assert (errors.cosine, errors.rel_l2) == (0.0, math.inf)
    dead = compare(zeros, torch.ones(4))
    assert (dead.cosine, dead.rel_l2) == (0.0, 1.0)
    assert not any(within(e, tolerance) for e in (errors, dead) for tolerance in TOLERANCES.values())


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2))


def test_large_values_do_not_overflow() -> None:
    x = torch.full((1000,), 3e38)
    assert compare(x, x).rel_l2 == 0.0
    assert compare(x.bfloat16(), x).rel_l2 < 4e-3


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.integers(0, 49), st.floats(0.5, 2))
def test_rel_l2_is_the_norm_of_the_difference(values: list[float], place: int, by: float) -> None:
    reference = torch.tensor(values, dtype=torch.float64)
    received = reference.clone()
    received[place % len(values)] += by
    errors = compare(received, reference)
    assert errors.max_abs == pytest.approx(by, rel=1e-6)
    if reference.norm() > 0:
        assert errors.rel_l2 == pytest.approx(by / float(reference.norm()), rel=1e-5)


def test_the_tolerances_are_these() -> None:
    assert {name: (t.min_cosine, t.max_rel_l2) for name, t in TOLERANCES.items()} == {
        "fp32": (0.9999999, 1e-5),
        "fp16": (0.9999, 5e-3),
        "bf16": (0.9995, 2e-2),
        "fp8": (0.997, 8e-2),
        "int8": (0.997, 8e-2),
        "fp4": (0.98, 0.2),
        "w4a16": (0.98, 0.2),
    }
    assert all(len(t.reason) > 20 for t in TOLERANCES.values())


@pytest.mark.parametrize("name", TOLERANCES)
def test_both_bounds_bind_and_include_their_ends(name: str) -> None:
    t = TOLERANCES[name]
    assert within(Errors(t.min_cosine, t.max_rel_l2, 0.0), t)
    assert not within(Errors(math.nextafter(t.min_cosine, 0), t.max_rel_l2, 0.0), t)
    assert not within(Errors(t.min_cosine, math.nextafter(t.max_rel_l2, 1), 0.0), t)
    assert not within(Errors(1.0, 0.0, 0.0, nonfinite=1), t)


def verdict(*checks: Check) -> Verdict:
    return Verdict(
        bundle="b", target="ort-cpu", precision="fp32", weights="random (seed 0)", reference="", executed=(),
        not_executed=(), tolerance={}, checks=checks, seconds=0.0,
    )  # fmt: skip


def check(binding: bool, passed: bool) -> Check:
    return Check("blocks.0", "local", CASE, Errors(1.0, 0.0, 0.0), binding=binding, passed=passed)


def test_a_verdict_with_nothing_run_never_passes() -> None:
    assert not verdict().passed
    assert verdict().first_failure is None
    assert not verdict().to_json()["passed"]
    # figures that are only reported prove nothing
    assert not verdict(check(binding=False, passed=True)).passed


def test_one_failure_fails_the_verdict() -> None:
    good, bad = check(binding=True, passed=True), check(binding=True, passed=False)
    assert verdict(good).passed
    assert not verdict(good, bad, good).passed
    assert verdict(good, bad, good).first_failure is bad
    # a value that is not finite fails it, even where the tolerance does not bind
    assert not verdict(good, dataclasses.replace(bad, binding=False)).passed
