"""Quantized engines are verified like any other, more of them, and what is not quantized in them more strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_deploy.model import calls
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import TOLERANCES, within
from mmdit_deploy.verify.chains import EngineCalls

QUANTIZED = ("fp8", "fp4")


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_healthy_quantized_engine_passes_at_eight_timesteps_of_three_shapes(
    healthy: Callable[[str], Path], name: str
) -> None:
    verdict = verify_bundle(healthy(name))
    assert verdict.passed
    timesteps: dict[tuple[int, ...], set[float]] = {}
    for check in verdict.checks:
        if check.level == "output":
            case = check.case
            timesteps.setdefault((case.batch, case.rows, case.cols, case.txt_tokens), set()).add(case.timestep)
    assert len(timesteps) == 3 and all(len(found) == 8 for found in timesteps.values())
    emulated = [words for words in verdict.executed if "fp4 emulated" in words]
    assert len(emulated) == (len(verdict.executed) if name == "fp4" else 0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_calls_without_anything_quantized_are_bound_as_in_the_compute_type(
    copy_of: Callable[[str], Any], name: str
) -> None:
    verdict = copy_of(name).verify(noise_floor="auto")
    assert verdict.passed
    local = {c.name: c for c in verdict.checks if c.level == "local"}
    assert {path for path, c in local.items() if c.bound_by is None} == {"blocks.0", "blocks.1"}
    assert all(c.bound_by == "fp16" and c.times_floor < 6 for p, c in local.items() if not p.startswith("blocks."))
    assert all(local[path].times_floor > 1.5 for path in ("blocks.0", "blocks.1"))  # what quantization costs
    (floor,) = verdict.noise_floors
    assert floor.what == "eager in float16"


def test_a_fault_in_what_is_not_quantized_hides_behind_no_quantization(copy_of: Callable[[str], Any]) -> None:
    """Two per cent in the text embedding: nothing to FP4, a fault to fp16."""
    copy = copy_of("fp4")

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["context_embedder.weight"] *= 1.02

    copy.edit_weights(scale)
    failure = copy.verify(whole=False).first_failure
    assert failure is not None and (failure.name, failure.level, failure.bound_by) == ("txt_embed", "local", "fp16")
    assert within(failure.errors, TOLERANCES["fp4"])  # which is why the plan is asked


def test_activations_are_handed_on_as_wide_as_the_graph_has_them(copy_of: Callable[[str], Any]) -> None:
    """fp16's largest number is 65504: a value that stays in fp32 between calls is not cut there by verification."""
    engine = copy_of("fp32").engine()  # a graph whose activations are all in fp32, as a plan may keep some
    call = next(c for c in calls(engine.spec) if c.path == "txt_embed")
    loaded = EngineCalls(engine.graph, engine.folder, "ort-cpu", torch.float16).load(call)
    huge = torch.full((1, 2, engine.spec.txt_dim), 1e6)
    assert torch.equal(loaded.rounded([huge])[0], huge)
    (made,) = loaded([huge])
    assert made.dtype == torch.float32 and made.isfinite().all() and made.abs().max() > 65504
