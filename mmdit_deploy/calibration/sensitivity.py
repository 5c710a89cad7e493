"""Which parts of a model can be quantized, and what each costs: the error if only that part is.

A part is what one role has in one block: the attention's projections, the MLP, the modulation, and the FP8 attention
itself. Everything else computes in fp32, so that the figures are those of quantization alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.calibration.observe import Progress
from mmdit_deploy.calibration.what_if import Distance, Effect, Part, effects
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.program import Program
from mmdit_deploy.model import calls
from mmdit_deploy.model.partition import call_of
from mmdit_deploy.precision import ROLES, PrecisionPlan, linears, role_of, stored
from mmdit_deploy.runtime.memory import available_memory
from mmdit_deploy.spec import ModelSpec

FP8_ATTENTION = "fp8 attention"  # beside the roles of linear layers
_WAITING = 4  # what waits between two calls, in times both streams: these, the block's input, and modulations


@dataclass(frozen=True)
class Unit:
    """What one role has in one block.

    Args:
        block: ``blocks.3``, or the call where it is of no block: ``final``.
        role: of its linear layers, or `FP8_ATTENTION`.
        part: of the plan.
        saved: bytes of weights that quantizing it saves.
    """

    block: str
    role: str
    part: Part
    saved: int


@dataclass(frozen=True)
class Row:
    """A unit's error.

    Args:
        output: of the model's final output, the worst sample.
        local: of the outputs of the calls that it is in, on equal inputs, the worst sample; None where one of these
            calls reads what another makes.
    """

    unit: Unit
    output: Distance
    local: Distance | None

    def to_json(self) -> dict[str, Any]:
        return {
            "block": self.unit.block,
            "role": self.unit.role,
            "saved_bytes": self.unit.saved,
            "rel_l2": self.output.rel_l2,
            "cosine": self.output.cosine,
            "local_rel_l2": None if self.local is None else self.local.rel_l2,
            "local_cosine": None if self.local is None else self.local.cosine,
        }


@dataclass(frozen=True)
class Sensitivity:
    """The errors of all units, in the order of the model."""

    rows: tuple[Row, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [row.to_json() for row in self.rows]

    def text(self) -> str:
        """A table by block and role: the relative L2 error of the final output, and of the block itself, in percent."""
        roles = [role for role in (*ROLES, FP8_ATTENTION) if any(row.unit.role == role for row in self.rows)]
        by_place = {(row.unit.block, row.unit.role): row for row in self.rows}
        blocks = list(dict.fromkeys(row.unit.block for row in self.rows))
        cells = [["", *roles]]
        cells += [[block, *(_cell(by_place.get((block, role))) for role in roles)] for block in blocks]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["relative L2 error in % of the output (and of the block) if only that is quantized"]
        for line in cells:
            rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
            lines.append("  ".join(["", line[0].ljust(widths[0]), *rest]).rstrip())
        return "\n".join(lines)


def units_of(spec: ModelSpec, plan: PrecisionPlan) -> tuple[Unit, ...]:
    """What a plan quantizes, by block and role, in the order of the model."""
    table, compute = linears(spec), getattr(torch, plan.precision.dtype)
    blocks = {call.path: call.block or call.path for call in calls(spec)}
    found: dict[tuple[str, str], list[str]] = {}
    for path in plan.linears:
        found.setdefault((blocks[call_of(f"{path}.weight")], role_of(path)), []).append(path)
    units = []
    for (block, role), paths in found.items():
        saved = 0
        for path in paths:
            rows, columns = table[path].shape
            now = sum(
                math.prod(t.shape) * t.dtype.itemsize for t in stored(plan.linears[path].scheme, rows, columns, compute)
            )
            saved += rows * columns * compute.itemsize - now
        units.append(Unit(block, role, Part(frozenset(paths)), saved))
    units += [Unit(call, FP8_ATTENTION, Part(attentions=frozenset({call})), 0) for call in plan.attentions]
    order = {block: i for i, block in enumerate(blocks.values())}
    return tuple(sorted(units, key=lambda unit: order[unit.block]))


def sensitivity(
    spec: ModelSpec,
    source: WeightSource,
    plan: PrecisionPlan,
    samples: Sequence[Mapping[str, Tensor]],
    *,
    programs: Mapping[str, Program] | None = None,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every unit of a plan.

    Args:
        samples: the model's inputs by name, e.g. of several timesteps and sizes.
        programs: of the model's kinds, where they are traced already.
        at_once: how many units are followed in one pass over the weights; None for as many as a quarter of the memory
            that is left holds. Each has activations of its own.
    """
    units = units_of(spec, plan)
    size = at_once or _fitting(spec, samples)
    found: list[Effect] = []
    for start in range(0, len(units), size):
        parts = [unit.part for unit in units[start : start + size]]
        found += effects(spec, source, plan, parts, samples, programs=programs, progress=progress)
    return Sensitivity(
        tuple(
            Row(unit, Distance.worst(effect.output), Distance.worst(effect.local) if effect.local else None)
            for unit, effect in zip(units, found, strict=True)
        )
    )


def _fitting(spec: ModelSpec, samples: Sequence[Mapping[str, Tensor]]) -> int:
    """How many units' activations fit in a quarter of the memory that is left; at least one's."""
    tokens = sum(s[name].shape[:2].numel() for s in samples for name in ("hidden_states", "encoder_hidden_states"))
    return max(1, available_memory() // (4 * _WAITING * tokens * spec.width * torch.float32.itemsize))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    local = "" if row.local is None else f" ({100 * row.local.rel_l2:.2f})"
    return f"{100 * row.output.rel_l2:.2f}{local}"
