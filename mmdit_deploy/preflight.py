"""What an export will need, known before anything heavy: memory, disk and rough time of each stage, or a refusal.

Memory is anonymous resident memory, as everywhere in this project. Mapped weights are counted apart: the kernel can
drop their pages, and then reads them again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdit_deploy.build import Target
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import weights_layout
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import MachineError, UsageError
from mmdit_deploy.hashed_file import check_free_space
from mmdit_deploy.model import calls
from mmdit_deploy.model.partition import call_bytes, partition
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.spec import PRECISIONS, ModelSpec, Precision
from mmdit_deploy.verify.cases import default_cases
from mmdit_deploy.verify.engine import ORT_CPU_MEMORY_FACTOR
from mmdit_deploy.verify.records import Case

# Times were measured on 2 cores of an AMD EPYC without a GPU, one job at a time: they say minutes or hours, no more.

# bench/results/export_cost.json: tracing to lowered graphs takes 8.9 s at depth 24 and 8.4 s at depth 2.
GRAPH_SECONDS = 9.0
GRAPH_MEMORY = 400_000_000
GRAPH_DISK = 32 * 2**20  # graphs, reference, manifest and report, rounded up

# bench/results/export_cost.json: 39.0 s for SD3.5-Large's 16.1 GB less 19.5 s for SD3-Medium's 4.06 GB, from a
# checkpoint in the file cache. Random weights, 5 blocks 1536 wide, torch on one thread while another job had the second
# core: 11 s per 10^9 values as fp32, 12 s as fp16.
CHECKPOINT_SECONDS_PER_BYTE = 1.6e-9
RANDOM_SECONDS_PER_VALUE = 12e-9
# Tensors are streamed, so the largest counts. Peaks of export_cost.json, 0.378 GB and 0.421 GB, differ by the largest
# tensor's own 43 MB. Random weights are drawn in fp32 and converted: blocks 2432 wide peak 0.17 GB above 1536 wide,
# which is 7.8 bytes for each value that the largest tensor has more.
WEIGHTS_MEMORY = 350_000_000
RANDOM_BYTES_PER_VALUE = 8

# bench/results/engine_build.json: TensorRT-RTX 1.7.1 for SM89, 24 joint blocks, 4.06 GB of fp16 weights, serialized to
# a stream: a peak of 5.7 GB of anonymous memory with the process's own, 2.0 GB in four segments; the weights' file is
# mapped besides. Three profiles were measured to take 3 × the kernels and 2 % more memory.
BUILD_SECONDS_PER_BYTE = 10.5e-9  # of weights, for each profile
PROCESS_MEMORY = 500_000_000  # Python with torch and TensorRT
BUILD_MEMORY = 130_000_000
BUILD_MEMORY_FACTOR = 1.4  # over the largest segment's weights
BUILD_MEMORY_PER_PROFILE = 0.01  # of that, for each profile after the first
BUILD_DISK_FACTOR = 1.02  # over the weights: they and the kernels
COMFORT = 0.9  # of the available memory: what the weights of a build and its memory should fit in together

# bench/results/parity_memory.json: depth 24 in fp16, streamed, 179 s and 1.06 GB; 168 s more with the whole engine.
# Taken to be arithmetic, and so to grow with parameters × tokens: 2.03e9 × 4083 there. Other sizes were not measured.
VERIFY_SECONDS_PER_VALUE_AND_TOKEN = 179 / 2.03e9 / 4083
WHOLE_SECONDS_PER_VALUE_AND_TOKEN = 168 / 2.03e9 / 4083
VERIFY_MEMORY = 350_000_000
VERIFY_BLOCK_FACTOR = 3  # over the largest call's weights in fp32 (eager call, session, its copy): fitted to 1.06 GB
VERIFY_BYTES_PER_TOKEN_AND_CHANNEL = 8  # computed, not measured: both chains' streams, of all cases at once

_MORE_MEMORY = "free memory, or run this on a machine that has more"


@dataclass(frozen=True)
class Stage:
    """One stage of an export and what it needs.

    Args:
        name: e.g. ``build rtx:sm89 (2 segments)``.
        seconds: roughly.
        memory_bytes: anonymous memory at its peak; the stage is refused where it is not available.
        mapped_bytes: weights that are mapped while it works. Where they do not fit too, they are read again.
        disk_bytes: that it adds to the bundle.
        remedy: what to do where the memory does not suffice.
    """

    name: str
    seconds: float
    memory_bytes: int
    mapped_bytes: int = 0
    disk_bytes: int = 0
    remedy: str = _MORE_MEMORY

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.memory_bytes,
            "mapped_bytes": self.mapped_bytes,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """What an export will do, stage after stage, and what it needs.

    Args:
        parameters: of the model.
        weights_bytes: of the weights file.
        stages: in order.
        segments: by TensorRT target, into how many engines the model is cut.
        available_memory: bytes, when the plan was made.
    """

    parameters: int
    weights_bytes: int
    stages: tuple[Stage, ...]
    segments: Mapping[str, int]
    available_memory: int

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What fits, but not comfortably."""
        return tuple(
            f"{stage.name}: {_gb(stage.memory_bytes)} and {_gb(stage.mapped_bytes)} of mapped weights do not fit "
            f"together into {_gb(self.available_memory)}; weights will be read from the disk more than once"
            for stage in self.stages
            if stage.memory_bytes <= self.available_memory < stage.memory_bytes + stage.mapped_bytes
        )

    def text(self) -> str:
        """A table for people; ends without a newline."""
        rows: list[tuple[str, ...]] = [("stage", "rough time", "memory", "mapped", "disk")]
        for s in self.stages:
            amounts = (_gb(s.memory_bytes), *(_gb(n) if n else "–" for n in (s.mapped_bytes, s.disk_bytes)))
            rows.append((s.name, rough_time(s.seconds), *amounts))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = ["  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join(
            [
                f"{self.parameters / 1e9:.3f} B parameters, weights file {self.weights_bytes / 1e9:.3f} GB, "
                f"disk needed {self.disk_bytes / 1e9:.3f} GB, memory {_gb(self.memory_bytes)} "
                f"({_gb(self.available_memory)} available), about {rough_time(self.seconds)}",
                *table,
                *(f"  warning: {warning}" for warning in self.warnings),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "weights_bytes": self.weights_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "available_memory_bytes": self.available_memory,
            "seconds": round(self.seconds, 1),
            "segments": dict(self.segments),
            "stages": [stage.to_json() for stage in self.stages],
            "warnings": list(self.warnings),
        }


def make_plan(
    spec: ModelSpec,
    precision: Precision,
    contract: Contract,
    targets: Sequence[Target],
    *,
    from_checkpoint: bool,
    segments: int | None = None,
    verify: bool = True,
    thorough: bool = False,
    graph_only: bool = False,
    memory: int | None = None,
) -> Plan:
    """Say what an export will do and need. Nothing is refused for this machine's sake: that is `check_plan`'s.

    Args:
        from_checkpoint: weights are read; else they are made up.
        segments: engines that each TensorRT target is cut into; None for as few as fit comfortably.
        verify, thorough, graph_only: as in an export.
        memory: bytes available; what this process may still take where not given.

    Raises:
        UsageError: there are not as many blocks as segments, or no target that is cut into segments.
    """
    memory = available_memory() if memory is None else memory
    cut = [target for target in targets if target.flavour is not None]
    if segments is not None and not cut:
        raise UsageError(
            "segments are what a TensorRT engine is cut into",
            received=f"--segments {segments} with {', '.join(target.name for target in targets)}",
            fix="drop --segments, or add a TensorRT target, e.g. --target rtx:sm89",
        )
    table = parameters(spec)
    numel = sum(p.numel for p in table)
    total = weights_layout(spec, getattr(torch, precision.dtype), {"format": "pt"}).total_bytes
    stages = [Stage("graph", GRAPH_SECONDS, GRAPH_MEMORY, disk_bytes=GRAPH_DISK)]
    counts: dict[str, int] = {}
    largest_of = _largest_segment(spec, precision)
    if segments is not None:
        largest_of(segments)  # refuses a number that cannot be, also where nothing is built
    if not graph_only:
        largest = max(math.prod(part.shape) for p in table for part in p.parts)
        stages.append(
            Stage(
                "weights",
                total * CHECKPOINT_SECONDS_PER_BYTE if from_checkpoint else numel * RANDOM_SECONDS_PER_VALUE,
                WEIGHTS_MEMORY + largest * (precision.itemsize if from_checkpoint else RANDOM_BYTES_PER_VALUE),
                disk_bytes=total,
            )
        )
        profiles = len(contract.profiles)
        if cut:
            auto = _fewest(largest_of, spec.depth, profiles, memory)
            count = auto if segments is None else segments
            counts = {target.name: count for target in cut}
            for target in cut:
                stages.append(_build(target, total, largest_of, count, auto, profiles, memory))
        if verify:
            stages += _verifications(spec, numel, targets, default_cases(contract, thorough=thorough), memory, thorough)
    return Plan(numel, total, tuple(stages), counts, memory)


def check_plan(plan: Plan, directory: Path) -> None:
    """Refuse a plan that this machine has no room for. Nothing is written.

    Args:
        directory: where the bundle goes; it and its parents need not be there.

    Raises:
        MachineError: a stage needs more memory than there is, or the bundle more disk.
    """
    available = plan.available_memory
    short = [stage for stage in plan.stages if stage.memory_bytes > available]
    if short:
        needs = ", ".join(f"{stage.name} needs {_gb(stage.memory_bytes)}" for stage in short)
        raise MachineError(
            "every stage must fit into the memory that is available",
            received=f"{needs}; {_gb(available)} are available",
            fix="; ".join(dict.fromkeys(stage.remedy for stage in short)),
        )
    # The parents of the bundle are made with it; the disk is that of the first one there is.
    parent = next(p for p in directory.absolute().parents if os.path.isdir(p))
    try:
        check_free_space(parent / directory.name, plan.disk_bytes)
    except MachineError as error:
        parts = ", ".join(f"{stage.name} {_gb(stage.disk_bytes)}" for stage in plan.stages if stage.disk_bytes)
        fewer = ", or build fewer targets" if len(plan.segments) > 1 else ""
        raise MachineError(
            f"{directory} needs {_gb(plan.disk_bytes)} on the disk: {parts}",
            received=error.received,
            fix=f"{error.fix}{fewer}",
        ) from None


def rough_time(seconds: float) -> str:
    """A time that is known to a digit or two: ``9 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _largest_segment(spec: ModelSpec, precision: Precision) -> Callable[[int], int]:
    """Bytes of the largest segment's weights, by the number of segments."""
    chain, weights = calls(spec), call_bytes(spec, precision)
    return lambda segments: max(sum(weights[p] for p in run) for run in partition(chain, weights, segments))


def _build_memory(largest: int, profiles: int) -> int:
    """Anonymous memory of building segments one after the other."""
    factor = BUILD_MEMORY_FACTOR * (1 + BUILD_MEMORY_PER_PROFILE * (profiles - 1))
    return PROCESS_MEMORY + BUILD_MEMORY + round(factor * largest)


def _fewest(largest_of: Callable[[int], int], blocks: int, profiles: int, memory: int) -> int:
    """The fewest segments whose build fits comfortably; where none does, the fewest of the smallest there are."""
    best, smallest = 1, largest_of(1)
    for count in range(1, blocks + 1):
        largest = largest_of(count)
        if _build_memory(largest, profiles) + largest <= COMFORT * memory:
            return count
        if largest < smallest:
            best, smallest = count, largest
    return best


def _build(
    target: Target, total: int, largest_of: Callable[[int], int], count: int, auto: int, profiles: int, memory: int
) -> Stage:
    largest = largest_of(count)
    if auto != count and _build_memory(largest_of(auto), profiles) <= memory:
        remedy = f"--segments {auto}, or --segments auto"
    else:
        needed = _gb(_build_memory(largest_of(auto), profiles))
        remedy = f"build {target.name} where there is more memory: even in {auto} segments it takes {needed}"
    return Stage(
        f"build {target.name} ({count} segment{'s' if count > 1 else ''})",
        total * profiles * BUILD_SECONDS_PER_BYTE,
        _build_memory(largest, profiles),
        mapped_bytes=largest,
        disk_bytes=round(BUILD_DISK_FACTOR * total),
        remedy=remedy,
    )


def _verifications(
    spec: ModelSpec, numel: int, targets: Sequence[Target], cases: Sequence[Case], memory: int, thorough: bool
) -> list[Stage]:
    """Each ONNX Runtime target block by block, and for all TensorRT targets the standard graph.

    What runs on a GPU besides is not in it: there are no figures for that.
    """
    tokens = sum(case.batch * (case.img_tokens + case.txt_tokens) for case in cases)
    most = max(case.batch * (case.img_tokens + case.txt_tokens) for case in cases)
    # The standard Attention holds the scores of all pairs of tokens in fp32; com.microsoft's does not.
    scores = max(4 * case.batch * spec.num_heads * (case.img_tokens + case.txt_tokens) ** 2 for case in cases)
    streamed = (
        VERIFY_MEMORY
        + VERIFY_BLOCK_FACTOR * max(call_bytes(spec, PRECISIONS["fp32"]).values())
        + VERIFY_BYTES_PER_TOKEN_AND_CHANNEL * (tokens * spec.width + most * spec.mlp_width)
    )
    work = numel * tokens
    seconds = work * VERIFY_SECONDS_PER_VALUE_AND_TOKEN
    remedy = ("drop --thorough, or " if thorough else "") + "add --no-verify, and run mmdit-verify where there is more"
    stages = []
    for target in targets:
        if target.flavour is not None:
            continue
        stages.append(Stage(f"verify {target.name}", seconds, streamed, remedy=remedy))
        # Done where it fits, and left out elsewhere: never a reason to refuse.
        whole = round(ORT_CPU_MEMORY_FACTOR * 4 * numel)
        if target.name == "ort-cpu" and whole <= memory:
            stages.append(Stage("verify ort-cpu (whole engine)", work * WHOLE_SECONDS_PER_VALUE_AND_TOKEN, whole))
    if any(target.flavour is not None for target in targets):
        # In full, or beside an ONNX Runtime target once per kind of call.
        some = seconds / spec.depth if stages else seconds
        stages.append(Stage("verify model.onnx", some, streamed + scores, remedy=remedy))
    return stages
