"""Verdicts as verification makes them, small and exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from mmdit_deploy.verify.records import Case, Check, Errors, Level, Verdict

CASES = (Case(1, 16, 16, 77, 1000.0), Case(1, 16, 16, 77, 20.0), Case(2, 8, 24, 33, 500.0))
BOUND = 5e-3

MakeVerdict = Callable[..., Verdict]


@pytest.fixture
def make_verdict() -> MakeVerdict:
    """Makes the verdict of an engine with `depth` blocks.

    `rel_l2` overrides the error by (level, name), or by name for all levels that bind; NaN stands for three
    non-finite values, which put a check out of tolerance at every level.
    """

    def make(
        depth: int = 4,
        *,
        rel_l2: dict[str | tuple[Level, str], float] | None = None,
        names: tuple[str, ...] | None = None,
        target: str = "ort-cpu",
        weights: str = "random (seed 0)",
        executed: tuple[str, ...] = (
            "ONNX Runtime on the CPU, block by block",
            "bf16 is emulated on this CPU",
        ),
        not_executed: tuple[str, ...] = (),
    ) -> Verdict:
        def check(name: str, level: Level, case: Case, binding: bool) -> Check:
            overrides = rel_l2 or {}
            value = overrides.get((level, name), overrides.get(name, 4e-4) if binding else 8e-4)
            if math.isnan(value):
                return Check(name, level, case, Errors(math.nan, math.nan, math.nan, 3), binding, False)
            errors = Errors(1 - value**2 / 2, value, value * 10)
            return Check(name, level, case, errors, binding, value <= BOUND or not binding)

        blocks = names or tuple(f"blocks.{i}" for i in range(depth))
        checks = [
            check(name, level, case, level == "local")
            for name in blocks
            for level in ("local", "cumulative")
            for case in CASES
        ]
        checks += [check("sample", level, case, True) for level in ("output", "engine") for case in CASES]
        return Verdict(
            bundle="sd3-tiny-fp16",
            target=target,
            precision="fp16",
            weights=weights,
            reference="the eager fp32 model",
            executed=executed,
            not_executed=not_executed,
            tolerance={"min_cosine": 0.9999, "max_rel_l2": BOUND, "reason": "eleven significant bits"},
            checks=tuple(checks) if executed else (),
            seconds=12.5,
        )

    return make
