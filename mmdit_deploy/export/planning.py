"""The precision plan of an export: from a recipe and from what calibration finds, or from another bundle's scales.

calibration ─┬─► scales ─► what is quantized, within a budget ─┐
             └─► ranges ─► what stays in fp32 ─────────────────┴► plan
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mmdit_deploy.calibration.budget import choose
from mmdit_deploy.calibration.bundle_plan import CALIBRATION
from mmdit_deploy.calibration.captured import read_captured
from mmdit_deploy.calibration.fp16_emulation import Bound
from mmdit_deploy.calibration.fp16_plan import Fp16Plan
from mmdit_deploy.calibration.fp16_ranges import ranges_of
from mmdit_deploy.calibration.fp16_search import plan_fp16
from mmdit_deploy.calibration.quantization import (
    needs_statistics,
    plan_quantization,
    plan_recorded,
    recorded_bf16_attentions,
)
from mmdit_deploy.calibration.scales_file import Scales, read_scales, write_scales
from mmdit_deploy.eager.program import Program
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.errors import UsageError
from mmdit_deploy.export.calibrated import Calibrated, by_tenths, calibrate
from mmdit_deploy.export.request import ExportRequest
from mmdit_deploy.model import calls
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.precision.structure import indivisible
from mmdit_deploy.verify.tolerances import TOLERANCES

Log = Callable[[str], None]
_SHOWN = 20  # lines of the fp16 plan in the log; the manifest has all


@dataclass(frozen=True)
class Planned:
    """The plan, and what the manifest says of it.

    Args:
        record: what was asked for and what decided, JSON-ready.
        numbers: whether the plan's numbers were found; without, they stand for those that calibration would find.
    """

    plan: PrecisionPlan
    record: Mapping[str, Any] = field(default_factory=dict)
    numbers: bool = True

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: schemes by linear layer, FP8 attentions, values in fp32, and what decided them.

        A number that was not found is null.
        """

        def number(value: float | None) -> float | None:
            return value if self.numbers else None

        return {
            "linears": {
                path: {"scheme": p.scheme.name, "input_amax": number(p.input_amax)}
                for path, p in self.plan.linears.items()
            },
            "fp8_attentions": {
                call: [{"q": number(a.q_amax), "k": number(a.k_amax), "v": number(a.v_amax)} for a in found]
                for call, found in self.plan.attentions.items()
            },
            "wide": {call: sorted(names) for call, names in self.plan.wide.items() if names},
            "bf16_attentions": list(self.plan.bf16_attentions),
            **self.record,
        }


def calibrates(request: ExportRequest) -> bool:
    """Whether the eager model is run to calibrate."""
    recipe = request.quantizes
    scaled = recipe is not None and request.scales is None
    finds = scaled and (request.budget is not None or (recipe is not None and needs_statistics(recipe)))
    return not request.graph_only and (request.seeks_islands or finds)


def check_calibration(request: ExportRequest) -> None:
    """Read what is calibrated with, before anything heavy.

    Raises:
        CheckpointError: a file cannot be read.
        UsageError: it is not what it should be, or of another model, or nothing is calibrated.
    """
    if request.calib is not None:
        if not request.graph_only and not calibrates(request):
            raise UsageError(
                "--calib says what to calibrate on",
                received=f"--calib with {request.precision.label}, of which only weights are quantized",
                fix="drop it, or quantize inputs as well, e.g. --fp8",
            )
        read_captured(request.calib, request.spec)
    if request.scales is not None:
        _recorded(request)


def plan_precision(request: ExportRequest, folder: Path, log: Log) -> Planned:
    """Decide the precision of everything, and write the scales into the bundle's folder.

    Raises:
        CheckpointError: the eager model itself computes NaN or Inf, or a file cannot be read.
        UsageError: a file is of another model, or fp16 cannot hold what an attention reads.
    """
    recipe = request.quantizes
    record: dict[str, Any] = {} if recipe is None else {"recipe": recipe.to_json()}
    if recipe is not None:
        for path in indivisible(request.spec, recipe):
            log(f"warning: {path} stays in {request.precision.base}: its inputs are no whole blocks of its scheme")
    if request.graph_only and request.scales is None:
        return Planned(request.structure, record, numbers=False)  # none are written
    seen: Calibrated | None = None
    programs = {}
    if calibrates(request):
        programs = programs_of(calls(request.spec), getattr(torch, request.precision.dtype))
        seen = calibrate(request, programs, log)
        record["calibration"] = dict(seen.record)
    plan = PrecisionPlan(request.precision)
    if request.scales is not None:
        plan, recorded = _recorded(request)
        record |= _taken_over(request.scales.name, recorded)
        log(f"scales: {len(plan.linears)} linear layers and {len(plan.attentions)} attentions as {request.scales} says")
    elif recipe is not None:
        statistics = None if seen is None else seen.statistics
        plan = plan_quantization(request.spec, request.precision, recipe, statistics, request.weights)
        if request.budget is not None and seen is not None:
            chosen = choose(
                request.spec,
                request.weights,
                plan,
                seen.samples,
                request.budget,
                programs=programs,
                progress=by_tenths("budget", log),
            )
            log(f"budget: {chosen.text()}")
            plan, record["budget"] = chosen.plan, chosen.to_json()
    if request.seeks_islands and seen is not None:
        islands = _islands(request, seen, programs, log)
        record["fp16_plan"] = islands.to_json()
        plan = replace(
            plan,
            wide=islands.wide,
            bf16_attentions=islands.bf16_attentions,
            attentions={call: a for call, a in plan.attentions.items() if call not in islands.bf16_attentions},
        )
    if recipe is not None and not request.graph_only:
        scales = Scales(request.spec, plan.linears, plan.attentions, record)
        write_scales(folder / CALIBRATION, scales)
    return Planned(plan, record)


def _islands(request: ExportRequest, seen: Calibrated, programs: Mapping[str, Program], log: Log) -> Fp16Plan:
    """What fp16 cannot hold, or rounds too much."""
    tolerance = TOLERANCES["fp16"]
    islands = plan_fp16(
        request.spec,
        request.weights,
        ranges_of(seen.statistics),
        seen.samples,
        Bound(tolerance.min_cosine, tolerance.max_rel_l2),
        outputs=request.outputs,
        programs=programs,
        progress=by_tenths("fp16 plan", log),
    )
    for line in islands.text().splitlines()[:_SHOWN]:
        log(line)
    for call in islands.out_of_bound:
        log(f"warning: {call} is further from fp32 than fp16 should be, whatever is kept in fp32")
    return islands


def _recorded(request: ExportRequest) -> tuple[PrecisionPlan, Scales]:
    """The plan with the scales of another bundle, and these."""
    recipe, scales = request.quantizes, request.scales
    if recipe is None or scales is None:
        raise ValueError("scales are of a quantized model")
    found = read_scales(scales, request.spec)
    return plan_recorded(request.spec, request.precision, recipe, found), found


def _taken_over(name: str, scales: Scales) -> dict[str, Any]:
    """What a record says of the scales that were taken over: also what they lack, for those who take over these."""
    calibration: dict[str, Any] = {"scales": name}
    if bf16 := recorded_bf16_attentions(scales.record):
        calibration["bf16_attentions"] = sorted(bf16)
    budget = {"budget": scales.record["budget"]} if "budget" in scales.record else {}
    return {"calibration": calibration, **budget}
