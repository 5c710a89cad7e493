"""Sampling with any model that can be asked for velocities: whole or call by call, the engine or the eager model.

x, t ─► inputs without and with the prompt ─► model ─► guided velocity ─► x
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdit_deploy.contract import Contract
from mmdit_deploy.eager.calls import EagerCalls, Values
from mmdit_deploy.eager.inputs import with_reference
from mmdit_deploy.errors import UsageError
from mmdit_deploy.model import Call
from mmdit_deploy.sampling import Step, guided, schedule, timesteps, trajectory
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.cases import INPUT_SEED, case_inputs
from mmdit_deploy.verify.noise_floor import Way
from mmdit_deploy.verify.records import Case
from mmdit_deploy.verify.streaming import last_uses
from mmdit_deploy.verify.whole import WholeEngine

# The contract's inputs by name, several at once → `sample` of each. Floats may be fp32: a model rounds as it must.
Model = Callable[[Sequence[Values]], list[Tensor]]
Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
TEXT = ("encoder_hidden_states", "encoder_hidden_states_mask", "pooled_projections")


@dataclass(frozen=True)
class Sampler:
    """How a trajectory is sampled: Euler's method, from pure noise.

    Args:
        steps: calls of the model, two at once with guidance.
        shift: of noise levels; SD3's is 3, `dynamic_shift` gives FLUX's.
        guidance: classifier-free, by how much; None for none.

    Raises:
        UsageError: there are no such steps, or no such shift or guidance.
    """

    steps: int = 20
    shift: float = 3.0
    guidance: float | None = None

    def __post_init__(self) -> None:
        _ = self.sigmas  # raises
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError("guidance is a number", received=f"{self.guidance}", fix="e.g. 4.5, or leave it out")

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [steps + 1], fp32."""
        return schedule(self.steps, self.shift)

    def __str__(self) -> str:
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"Euler, {self.steps} steps, shift {self.shift:g}{guidance}"


class Stepped:
    """A model that is computed call by call.

    Args:
        chain: the model's calls, in order.
        load: gives a call with its weights.
        keep: hold every call once it is loaded; else one call's weights are in memory at a time, and are read again at
            every step.
    """

    def __init__(self, chain: Sequence[Call], contract: Contract, load: Callable[[Call], Function], *, keep: bool):
        self._chain, self._load, self._keep = chain, load, keep
        self._over = last_uses(chain, contract)
        self._loaded: dict[str, Function] = {}

    def __call__(self, inputs: Sequence[Values]) -> list[Tensor]:
        """A call is loaded once for all inputs."""
        running = [dict(values) for values in inputs]
        for call, over in zip(self._chain, self._over, strict=True):
            function = self._loaded.get(call.path) or self._load(call)
            if self._keep:
                self._loaded[call.path] = function
            for values in running:
                made = function([values[name] for name in call.inputs])
                values.update(zip(call.outputs, made, strict=True))
                for name in over:
                    del values[name]
        return [values["sample"] for values in running]


def whole_model(whole: WholeEngine, contract: Contract) -> Model:
    """A loaded engine as a model."""

    def model(inputs: Sequence[Values]) -> list[Tensor]:
        rounded = [{t.name: values[t.name].to(getattr(torch, t.dtype)) for t in contract.inputs} for values in inputs]
        return [whole.run(values)["sample"] for values in rounded]

    return model


def eager_in(way: Way, eager: EagerCalls) -> Callable[[Call], Function]:
    """Loads calls of the eager model, to be computed another way."""
    return lambda call: way.of(call, eager.load(call))


@dataclass(frozen=True)
class Start:
    """Where a trajectory starts, and what steers it.

    Args:
        case: the shape.
        time_scale: of the model.
        grid, channels: the latent's rows and columns of tokens, and its channels, in ``hidden_states``: reference
            images after it, and channels that only condition, stay as they are.
        prompts: the contract's inputs without the prompt, where there is guidance, and with it.
    """

    case: Case
    time_scale: float
    grid: tuple[int, int]
    channels: int
    prompts: tuple[Values, ...]

    @staticmethod
    def of(spec: ModelSpec, case: Case, prompt: Values, without: Values | None = None) -> Start:
        """The start for inputs of a model; ``hidden_states`` is noise.

        Raises:
            UsageError: the model makes more channels than it takes, so that its output moves no latent.
        """
        if spec.out_dim > spec.img_dim:
            raise UsageError(
                "a trajectory is sampled with a model whose output moves its input",
                received=f"{spec.name} takes {spec.img_dim} channels and makes {spec.out_dim}",
                fix="leave the trajectory out",
            )
        grid = with_reference(spec, case.rows, case.cols)[0]
        prompts = (prompt,) if without is None else (without, prompt)
        return Start(case, spec.time_scale, grid, spec.out_dim, prompts)

    @staticmethod
    def drawn(spec: ModelSpec, contract: Contract, case: Case, sampler: Sampler) -> Start:
        """The start for made-up inputs: those of a verification's case, and of guidance another prompt."""
        case = replace(case, timestep=1000.0)
        prompt = case_inputs(case, contract, spec)
        if sampler.guidance is None:
            return Start.of(spec, case, prompt)
        other = case_inputs(case, contract, spec, seed=INPUT_SEED + 1)
        return Start.of(spec, case, prompt, {**prompt, **{name: other[name] for name in TEXT if name in other}})

    @property
    def tokens(self) -> int:
        """Of the latent; they are the first."""
        rows, cols = self.grid
        return rows * cols

    @property
    def noise(self) -> Tensor:
        """The latent to start from, fp32 [batch, tokens, channels]."""
        return self.prompts[-1]["hidden_states"][:, : self.tokens, : self.channels].float()

    def sample(self, model: Model, sampler: Sampler) -> Iterator[Step]:
        """The steps of a model's own trajectory."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            made = model([self._at(values, x, timesteps(sigma, self.time_scale)) for values in self.prompts])
            moved = [v[:, : self.tokens, : self.channels] for v in made]
            return moved[0] if sampler.guidance is None else guided(moved[0], moved[1], sampler.guidance)

        return trajectory(velocity, self.noise, sampler.sigmas)

    def _at(self, values: Values, x: Tensor, timestep: Tensor) -> Values:
        hidden = values["hidden_states"].float().clone()
        hidden[:, : self.tokens, : self.channels] = x
        return {**values, "hidden_states": hidden, "timestep": timestep}
