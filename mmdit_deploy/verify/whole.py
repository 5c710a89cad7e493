"""The whole engine, loaded as its users load it, where this machine can."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.contract import CONDITIONING
from mmdit_deploy.errors import MachineError
from mmdit_deploy.runtime import available_memory, check_runs_here, open_runner
from mmdit_deploy.runtime.conditioning import STEPS, Conditioner, InOnePiece
from mmdit_deploy.runtime.split import InTwoParts
from mmdit_deploy.verify.chains import axis_sizes
from mmdit_deploy.verify.under_test import EngineUnderTest

# Anonymous memory of an ONNX Runtime CPU session over bytes of weights as fp32: the copy that is computed with, and
# activations. Measured with 2.03 B parameters in fp16: 10.0 GB (1.23), and some room.
ORT_CPU_MEMORY_FACTOR = 1.4
GIB = 2**30


class WholeEngine:
    """An engine that is loaded; leave its ``with`` to free it.

    Raises:
        MachineError: it does not load here.
    """

    def __init__(self, engine: EngineUnderTest):
        self._contract = engine.contract
        self._runner = open_runner(engine.target, engine.files, engine.record, in_turn=engine.parts is not None)
        self._conditioner: Conditioner = InOnePiece(engine.contract)
        self._in_two = engine.parts is not None
        if engine.parts is not None:
            load = partial(engine.parts.conditioning.open, engine.target)
            self._conditioner = InTwoParts(engine.parts.contract, load)

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The contract's outputs for its inputs, both by name and on the CPU.

        Of an engine in two parts it is the middle step of a schedule, as sampling has it.
        """
        device = self._runner.device
        inputs = {t.name: values[t.name].to(device) for t in self._contract.inputs}
        sizes = axis_sizes(self._contract.inputs, list(inputs.values()))
        outputs = {
            t.name: torch.empty(t.shape(sizes), dtype=getattr(torch, t.dtype), device=device)
            for t in self._contract.outputs
        }
        self._runner.run(self._of_step(inputs, sizes), outputs, sizes)
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def _of_step(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        """What the runner reads. Rows of a table that are out of order show, as no step has the timesteps of another.

        A table of one step would hide that.
        """
        if not self._in_two:
            return self._conditioner.complete(inputs, sizes)
        conditions = {name: tensor for name, tensor in inputs.items() if name in CONDITIONING}
        times = inputs["timestep"]
        schedule = {**conditions, "timestep": torch.stack([times / 2, times, times / 4])}
        steps = self._conditioner.tabulate(schedule, {**sizes, STEPS: len(schedule["timestep"])})
        return {**{name: tensor for name, tensor in inputs.items() if name not in conditions}, **steps[1]}

    def __enter__(self) -> WholeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()
        self._conditioner.close()


def in_words(error: MachineError) -> str:
    """Why something did not run, in a line."""
    return f"{error.rule}; here: {error.received}"


def whole_engine_refusal(engine: EngineUnderTest) -> str | None:
    """Why the whole engine is not run here, or None where it can be."""
    if not engine.whole:
        return "left out on request (--blocks-only)"
    if engine.record is not None:
        try:
            check_runs_here(engine.record, engine.target)
        except MachineError as error:
            return in_words(error)
        return None
    if engine.target.name != "ort-cpu":
        return None
    numel = sum(p.numel for p in parameters(engine.spec))
    needed, available = ORT_CPU_MEMORY_FACTOR * 4 * numel, available_memory()
    if needed <= available:
        return None
    return f"it needs about {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
