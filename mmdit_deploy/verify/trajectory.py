"""The engine's own trajectory beside the eager model's: what errors of steps come to in the end.

noise ─┬─ eager  ─ x ─ eager  ─ x ─ …  image
       └─ engine ─ x ─ engine ─ x ─ …  image
                   │            │        └ PSNR, SSIM, LPIPS
                   └────────────┴ relative L2 and cosine of the latent, after each step
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdit_deploy.build import execution_of
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.eager.calls import EagerCalls
from mmdit_deploy.model import calls
from mmdit_deploy.runtime import available_memory
from mmdit_deploy.sampling import timesteps, unpatchify
from mmdit_deploy.verify.bounds import Bounds
from mmdit_deploy.verify.cases import default_cases
from mmdit_deploy.verify.chains import EngineCalls
from mmdit_deploy.verify.image import Decoder, compare_images, lpips_missing, scaled
from mmdit_deploy.verify.metrics import compare, within
from mmdit_deploy.verify.noise_floor import Way
from mmdit_deploy.verify.records import Case, Check, Trajectory, TrajectoryStep, Verdict
from mmdit_deploy.verify.sampling import Model, Sampler, Start, Stepped, eager_in, whole_model
from mmdit_deploy.verify.streaming import Progress
from mmdit_deploy.verify.under_test import EngineUnderTest
from mmdit_deploy.verify.whole import ORT_CPU_MEMORY_FACTOR, WholeEngine, whole_engine_refusal
from mmdit_deploy.verify.wiring import check_wiring

STEP, FINAL = "latent", "final latent"
EAGER_MEMORY_FACTOR = 1.1  # of bytes of weights as fp32: them, and activations


@dataclass(frozen=True)
class Sampled:
    """A trajectory that was sampled on both sides.

    Args:
        record: its steps.
        engine, eager: the last latents, fp32 [batch, tokens, channels].
        floor: the eager model's in the engine's compute type; None if not sampled.
        checks: of the latent after each step; the tolerance binds the last.
    """

    record: Trajectory
    engine: Tensor
    eager: Tensor
    floor: Tensor | None
    checks: tuple[Check, ...]


def sample_both(
    engine: Model,
    eager: Model,
    start: Start,
    sampler: Sampler,
    bounds: Bounds,
    *,
    how: str,
    floor: Model | None = None,
    progress: Progress | None = None,
) -> Sampled:
    """Sample with the engine and with the eager model, each from what it made itself, and compare after each step.

    Args:
        engine, eager: whole or call by call.
        how: the engine ran, in words.
        floor: the eager model computed in another way, which is sampled too.
        progress: called after each step.

    Raises:
        UsageError: there is no such schedule.
    """
    models = [engine, eager, *([] if floor is None else [floor])]
    steps: list[TrajectoryStep] = []
    latents: list[Tensor] = []
    for made in zip(*(start.sample(model, sampler) for model in models), strict=True):
        latents = [step.x_next for step in made]
        noise = compare(latents[2], latents[1]).rel_l2 if floor is not None else None
        steps.append(
            TrajectoryStep(float(timesteps(torch.tensor(made[0].sigma))), compare(latents[0], latents[1]), noise)
        )
        if progress is not None:
            progress(f"step {len(steps)}", len(steps) - 1, sampler.steps)
    checks = [_check(step, start.case, bounds, last=step is steps[-1]) for step in steps]
    return Sampled(
        Trajectory(STEP, start.case, str(sampler), how, tuple(steps)),
        latents[0],
        latents[1],
        latents[2] if floor is not None else None,
        tuple(checks),
    )


def image_check(sampled: Sampled, grid: tuple[int, int], patch: int, bounds: Bounds, decode: Decoder | None) -> Check:
    """Compare what the last latents become.

    Args:
        grid: rows and columns of the image, in tokens.
        patch: a token's side in the latent.
        decode: makes the images; without one they are the latents themselves, `scaled`.
    """

    def image(tokens: Tensor) -> Tensor:
        latent = unpatchify(tokens, grid, patch)
        return scaled(latent) if decode is None else decode(latent)

    reference = image(sampled.eager)
    errors = compare_images(image(sampled.engine), reference)
    floor = None if sampled.floor is None else compare(image(sampled.floor), reference).rel_l2
    name = "latent as an image" if decode is None else "decoded image"
    return Check(name, "image", sampled.record.case, errors, True, within(errors, bounds.image), "image", floor)


def with_trajectories(
    verdict: Verdict,
    engine: EngineUnderTest,
    source: WeightSource,
    sampler: Sampler,
    *,
    cases: Sequence[Case] = (),
    decode: Decoder | None = None,
    noise_floor: bool = True,
    progress: Progress | None = None,
) -> Verdict:
    """A verdict with the engine's trajectories, and the images at their ends.

    The engine is run whole where this machine can, else call by call; the eager model is held in memory where that has
    room for it, else read again at every step. What a TensorRT engine would do that cannot run here, its graph does.

    Args:
        verdict: on the engine.
        source: the weights.
        cases: shapes; by default one of batch 1.
        decode: makes images of latents, see `load_decoder`.
        noise_floor: sample the eager model in the engine's compute type too, where that has 16 bits.

    Raises:
        UsageError: the model has no trajectory, or there is no such schedule.
        MachineError: the engine does not load here.
    """
    begun = time.perf_counter()
    cases = cases or default_cases(engine.contract)[:1]
    # Before anything is loaded: it says whether there is a trajectory.
    starts = [Start.drawn(engine.spec, engine.contract, case, sampler) for case in cases]
    checks: list[Check] = []
    records: list[Trajectory] = []
    with ExitStack() as stack:
        asked, eager, floor, how = _models(engine, source, noise_floor, stack)
        for start in starts:
            sampled = sample_both(asked, eager, start, sampler, engine.bounds, how=how, floor=floor, progress=progress)
            records.append(sampled.record)
            checks += sampled.checks
            checks.append(image_check(sampled, start.grid, engine.spec.patch_size, engine.bounds, decode))
    missing = lpips_missing() if decode is not None else None
    return replace(
        verdict,
        checks=(*verdict.checks, *checks),
        trajectories=(*verdict.trajectories, *records),
        executed=(*verdict.executed, *(f"a trajectory ({r.sampler}; {r.case}): {r.engine}" for r in records)),
        not_executed=(*verdict.not_executed, *(() if missing is None else (f"LPIPS of the image: {missing}",))),
        seconds=verdict.seconds + time.perf_counter() - begun,
    )


def _models(
    engine: EngineUnderTest, source: WeightSource, noise_floor: bool, stack: ExitStack
) -> tuple[Model, Model, Model | None, str]:
    """The engine, the eager model and its noise floor, and how the engine runs."""
    chain, dtype = calls(engine.spec, engine.outputs), getattr(torch, engine.precision.dtype)
    eager = EagerCalls(engine.spec, source)
    weights = 4 * sum(p.numel for p in parameters(engine.spec))
    sides = 1 + (noise_floor and dtype != torch.float32) / 2
    refusal = whole_engine_refusal(engine)
    on_cpu = engine.target.name == "ort-cpu" and refusal is None
    needed = weights * (EAGER_MEMORY_FACTOR * sides + ORT_CPU_MEMORY_FACTOR * on_cpu)
    keep = needed <= available_memory()
    asked: Model
    if refusal is None:
        asked = whole_model(stack.enter_context(WholeEngine(engine)), engine.contract)
        how = f"the whole engine: {execution_of(engine.target, engine.precision)}"
    else:
        stepped = EngineCalls(engine.graph, engine.folder, engine.stepped_on.name, dtype)
        check_wiring(engine.graph, chain)
        asked = Stepped(chain, engine.contract, stepped.load, keep=False)
        graph = "" if engine.record is None else "its graph, "
        how = f"{graph}call by call: {execution_of(engine.stepped_on, engine.precision)}"
    floor: Model | None = None
    if noise_floor and dtype != torch.float32:
        floor = Stepped(chain, engine.contract, eager_in(Way(dtype), eager), keep=keep)
    return asked, Stepped(chain, engine.contract, eager.load, keep=keep), floor, how


def _check(step: TrajectoryStep, case: Case, bounds: Bounds, *, last: bool) -> Check:
    at = replace(case, timestep=step.timestep)
    if last:
        passed = within(step.errors, bounds.trajectory)
        return Check(FINAL, "trajectory", at, step.errors, True, passed, "trajectory", step.floor)
    return Check(STEP, "trajectory", at, step.errors, False, step.errors.nonfinite == 0, "trajectory", step.floor)
