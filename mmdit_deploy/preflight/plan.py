"""What an export will need, stage by stage, and the refusal where this machine has no room for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_deploy.errors import MachineError
from mmdit_deploy.hashed_file import check_free_space

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
        caveat: what the figures leave out, if anything.
    """

    name: str
    seconds: float
    memory_bytes: int
    mapped_bytes: int = 0
    disk_bytes: int = 0
    remedy: str = _MORE_MEMORY
    caveat: str = ""

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
        """What fits, but not comfortably, and what the figures leave out."""
        tight = tuple(
            f"{stage.name}: {gb(stage.memory_bytes)} and {gb(stage.mapped_bytes)} of mapped weights do not fit "
            f"together into {gb(self.available_memory)}; weights will be read from the disk more than once"
            for stage in self.stages
            if stage.memory_bytes <= self.available_memory < stage.memory_bytes + stage.mapped_bytes
        )
        return tight + tuple(f"{stage.name}: {stage.caveat}" for stage in self.stages if stage.caveat)

    def text(self) -> str:
        """A table for people; ends without a newline."""
        rows: list[tuple[str, ...]] = [("stage", "rough time", "memory", "mapped", "disk")]
        for s in self.stages:
            amounts = (gb(s.memory_bytes), *(gb(n) if n else "–" for n in (s.mapped_bytes, s.disk_bytes)))
            rows.append((s.name, rough_time(s.seconds), *amounts))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = ["  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join(
            [
                f"{self.parameters / 1e9:.3f} B parameters, weights file {self.weights_bytes / 1e9:.3f} GB, "
                f"disk needed {self.disk_bytes / 1e9:.3f} GB, memory {gb(self.memory_bytes)} "
                f"({gb(self.available_memory)} available), about {rough_time(self.seconds)}",
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
        needs = ", ".join(f"{stage.name} needs {gb(stage.memory_bytes)}" for stage in short)
        raise MachineError(
            "every stage must fit into the memory that is available",
            received=f"{needs}; {gb(available)} are available",
            fix="; ".join(dict.fromkeys(stage.remedy for stage in short)),
        )
    # The parents of the bundle are made with it; the disk is that of the first one there is.
    parent = next(p for p in directory.absolute().parents if os.path.isdir(p))
    try:
        check_free_space(parent / directory.name, plan.disk_bytes)
    except MachineError as error:
        parts = ", ".join(f"{stage.name} {gb(stage.disk_bytes)}" for stage in plan.stages if stage.disk_bytes)
        fewer = ", or build fewer targets" if len(plan.segments) > 1 else ""
        raise MachineError(
            f"{directory} needs {gb(plan.disk_bytes)} on the disk: {parts}",
            received=error.received,
            fix=f"{error.fix}{fewer}",
        ) from None


def rough_time(seconds: float) -> str:
    """A time that is known to a digit or two: ``9 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gb(nbytes: int) -> str:
    """E.g. ``4.06 GB``."""
    return f"{nbytes / 1e9:.2f} GB"
