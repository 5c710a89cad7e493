"""An engine in two parts: what makes the modulation of a schedule, and the trunk that reads it step by step.

    timestep [S, B] ─ rows s·B + b ─ conditioning ─ modulation [S·B, total] ─ rows s·B … s·B + B − 1 ─ trunk, step s

The conditioning engine runs once for a schedule, the trunk once for a step. Between schedules the first one's weights,
a third of a model, need not be in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmdit_deploy.build import EngineRecord, Target
from mmdit_deploy.contract import SplitContract
from mmdit_deploy.errors import MachineError, UsageError
from mmdit_deploy.runtime.runner import Runner, open_runner

RESIDENT, RELEASED = "resident", "released"


@dataclass(frozen=True)
class Loadable:
    """What an engine, or a part of one, is loaded from.

    Args:
        files: the graph, for ONNX Runtime; the engine files in order, for TensorRT.
        record: what was built, for TensorRT.
    """

    files: tuple[Path, ...]
    record: EngineRecord | None = None

    def open(self, target: Target) -> Runner:
        """Load it, on the target's current device, beside the other part."""
        return open_runner(target, self.files, self.record, in_turn=True)


@dataclass(frozen=True)
class Parts:
    """What makes a trunk a whole model: the contracts of the parts, and the other one of these."""

    contract: SplitContract
    conditioning: Loadable


def check_residence(conditioning: str) -> None:
    """Check what a caller says of the conditioning engine's stay in memory.

    Raises:
        UsageError: it is neither of the two.
    """
    if conditioning not in (RESIDENT, RELEASED):
        raise UsageError(
            f"between schedules the conditioning engine is {RESIDENT} or {RELEASED}",
            received=repr(conditioning),
            fix=f"conditioning={RESIDENT!r}, which keeps it loaded, is the default",
        )


class InTwoParts:
    """The conditioning of an engine whose trunk is a graph of its own: a `Conditioner`.

    Args:
        contract: of the parts.
        load: makes the conditioning engine.
        keep: load it now and keep it; without, it is loaded for each schedule and closed again.

    Raises:
        MachineError: it does not load here.
    """

    def __init__(self, contract: SplitContract, load: Callable[[], Runner], *, keep: bool = True):
        self.step = contract.trunk
        self._conditions, self._table = contract.conditioning, contract.table
        self._load, self._lock, self._closed = load, threading.Lock(), False
        self._runner = load() if keep else None

    def tabulate(self, schedule: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[dict[str, Tensor]]:
        """The table's rows of each step, of one memory; schedules of more rows than the engine takes run in pieces."""
        steps, batch = sizes["steps"], sizes["batch"]
        times = schedule["timestep"]
        table = self._empty(steps * batch, times.device)
        at_once = self._conditions.ranges["batch"].max // batch
        with self._loaded() as runner:
            for first in range(0, steps, at_once):
                count = min(at_once, steps - first)
                rows = {name: _for_steps(tensor, count) for name, tensor in schedule.items() if name != "timestep"}
                rows["timestep"] = times[first : first + count].reshape(-1)
                made = table[first * batch : (first + count) * batch]
                runner.run(rows, {self._table.name: made}, {"batch": count * batch})
        return [{self._table.name: part} for part in table.split(batch)]

    def complete(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        """All inputs of the model as those of its trunk: a schedule of one step."""
        conditions = {spec.name: inputs[spec.name] for spec in self._conditions.inputs}
        (table,) = self.tabulate({**conditions, "timestep": inputs["timestep"][None]}, {**sizes, "steps": 1})
        return {**{name: tensor for name, tensor in inputs.items() if name not in conditions}, **table}

    def close(self) -> None:
        """Free the conditioning engine. No more tables can be made."""
        self._closed = True
        if self._runner is not None:
            self._runner.close()

    @contextmanager
    def _loaded(self) -> Iterator[Runner]:
        self._check_open()
        if self._runner is not None:
            yield self._runner
            return
        with self._lock:  # its memory is taken once, however many threads make tables
            self._check_open()
            runner = self._load()
            try:
                yield runner
            finally:
                runner.close()

    def _check_open(self) -> None:
        if self._closed:
            raise MachineError("the conditioning engine can be loaded", received="it was closed", fix="load the engine")

    def _empty(self, rows: int, device: torch.device) -> Tensor:
        dtype = getattr(torch, self._table.dtype)
        return torch.empty(self._table.shape({"batch": rows}), dtype=dtype, device=device)


def _for_steps(tensor: Tensor, steps: int) -> Tensor:
    """What is said of each sample, for each sample of each step. [B, …] → [steps · B, …]"""
    return tensor.repeat(steps, *(1 for _ in tensor.shape[1:]))
