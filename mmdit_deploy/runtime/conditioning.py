"""What a model knows of a step besides the latent, made once for a whole schedule.

    engine.condition(timestep [S, B], …)  ─►  table
    engine(latent, text, ids)  ─►  velocity          for each step s, with conditioning=table[s]

An engine in one piece reads timestep, guidance and pooled text in every call: a step of its table is a row of them. An
engine whose conditioning is a graph of its own has made modulation tensors of them: a step is the part of each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor

from mmdit_deploy.contract import CONDITIONING, Contract, Range, TensorSpec
from mmdit_deploy.errors import ContractError

STEPS = "steps"
_ANY = Range(1, 1, 1_000_000)


@dataclass(frozen=True)
class StepConditioning:
    """One step of a `Conditioning`.

    Args:
        tensors: by name, what the engine reads in the place of the conditioning inputs.
        of: what tells the engine that made it.
    """

    tensors: Mapping[str, Tensor]
    of: object


class Conditioning(Sequence[StepConditioning]):
    """A schedule's conditioning: ``table[s]`` is step s, ``len(table)`` the number of steps.

    Args:
        steps: for each, what the engine reads in the place of the conditioning inputs.
        of: what tells the engine that made it.
    """

    def __init__(self, steps: Sequence[Mapping[str, Tensor]], of: object):
        self._steps = tuple(StepConditioning(tensors, of) for tensors in steps)

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, step: int) -> StepConditioning: ...

    @overload
    def __getitem__(self, step: slice) -> Sequence[StepConditioning]: ...

    def __getitem__(self, step: int | slice) -> StepConditioning | Sequence[StepConditioning]:
        return self._steps[step]


def schedule_contract(contract: Contract) -> Contract:
    """What `Engine.condition` takes: a model's conditioning inputs, with timesteps [steps, batch]."""
    inputs = tuple(
        TensorSpec(t.name, (STEPS, *t.axes), t.dtype) if t.name == "timestep" else t
        for t in contract.inputs
        if t.name in CONDITIONING
    )
    return Contract(inputs, (), {"batch": contract.ranges["batch"], STEPS: _ANY})


class Conditioner(Protocol):
    """What an engine does about conditioning, by how it was exported."""

    @property
    def step(self) -> Contract:
        """What is read in a step; its inputs that are none of the model's are what `tabulate` makes."""
        ...

    def tabulate(self, schedule: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[dict[str, Tensor]]:
        """What each step reads in the place of the conditioning inputs, on torch's current stream.

        Args:
            schedule: as `schedule_contract` has it, checked. It may be written to by its owner afterwards.
            sizes: of ``steps`` and ``batch``.
        """
        ...

    def complete(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        """All inputs of the model, checked, as what is read in a step, on torch's current stream."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class InOnePiece:
    """An engine that reads the conditioning inputs themselves in every step."""

    def __init__(self, contract: Contract):
        self.step = contract

    def tabulate(self, schedule: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[dict[str, Tensor]]:
        own = {name: tensor.detach().clone() for name, tensor in schedule.items()}
        return [{**own, "timestep": row} for row in own["timestep"].unbind()]

    def complete(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        return inputs

    def close(self) -> None:
        pass


def with_conditioning(inputs: Mapping[str, Tensor], conditioning: StepConditioning, of: object) -> Mapping[str, Tensor]:
    """All that an engine reads in a step.

    Args:
        inputs: those that the caller named.
        of: what tells the engine that is called.

    Raises:
        ContractError: the conditioning is another engine's, or the caller named some of it too.
    """
    if conditioning.of is not of:
        raise ContractError(
            "a step's conditioning is made by the engine that is called",
            received="another engine's",
            fix="table = engine.condition(…), then engine(…, conditioning=table[step])",
        )
    twice = sorted({*CONDITIONING, *conditioning.tensors} & set(inputs))
    if twice:
        raise ContractError(
            "what the conditioning holds is no input besides",
            received=", ".join(twice),
            fix="pass conditioning=table[step] or these inputs, not both",
        )
    return {**inputs, **conditioning.tensors}
