"""Latency of a bundle's engines against the eager model and `torch.compile`, in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_deploy.build import execution_of, parse_target
from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.calibration.bundle_plan import bundle_plan
from mmdit_deploy.checkpoint import SafetensorsFile
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import FileWeights, WeightSource, read_parameter
from mmdit_deploy.errors import UsageError
from mmdit_deploy.latency.timing import Run, Timing, time_interleaved
from mmdit_deploy.machine import machine_facts
from mmdit_deploy.model import MMDiT
from mmdit_deploy.precision.weights import QuantizedWeights
from mmdit_deploy.report.words import machine_words, printable
from mmdit_deploy.runtime import Engine, available_memory, check_runnable, engine_files, runnable_target
from mmdit_deploy.runtime.tensorrt import choose_profile
from mmdit_deploy.verify.cases import case_inputs, fit_grid
from mmdit_deploy.verify.records import Case


@dataclass(frozen=True)
class LatencyReport:
    """What was timed, on what, and how it compares.

    Args:
        case: the input's sizes.
        timings: engines first, then the rivals that ran.
        not_run: rivals that could not run here, with the reason.
        ratios: engine over rival, by ``engine / rival``; below 1 the engine is faster.
        machine: processor, GPU, driver and versions, as `machine_facts` has them.
    """

    bundle: str
    precision: str
    weights: str
    case: Case
    timings: tuple[Timing, ...]
    not_run: dict[str, str]
    ratios: dict[str, float]
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def text(self) -> str:
        width = max(14, *(len(t.name) for t in self.timings))
        lines = [f"{self.bundle} ({self.precision}, weights {self.weights}), {self.case}"]
        lines += [
            f"  {t.name:{width}s} p50 {t.p50_ms:10.2f} ms   p90 {t.p90_ms:10.2f} ms   {t.how}" for t in self.timings
        ]
        lines += [f"  {name:{width}s} not run: {reason}" for name, reason in self.not_run.items()]
        lines += [f"  {pair}: {ratio:.3f}" for pair, ratio in self.ratios.items()]
        lines += [f"  on {printable(machine_words(self.machine))}"]
        return "\n".join(lines)


def bench_bundle(
    path: str | Path,
    targets: Sequence[str] = (),
    *,
    batch: int | None = None,
    img_tokens: int | None = None,
    txt_tokens: int | None = None,
    rounds: int = 10,
    warmup: int = 2,
) -> LatencyReport:
    """Time a bundle's engines, interleaved with the eager model and `torch.compile`.

    Args:
        targets: engines that run on one device; by default what this machine can run.
        batch, img_tokens, txt_tokens: sizes; by default the optimum of the first profile that holds the others.

    Raises:
        UsageError: there is no such engine, they run on different devices, or no image has so many tokens.
        MachineError: an engine is not in the bundle, or cannot run here.
        ContractError: a size is out of range, or the sizes lie in no profile of an engine.
    """
    bundle = open_bundle(path)
    names = tuple(dict.fromkeys(targets)) or (runnable_target(bundle),)
    device = _device(names)
    # Before anything of that size is made: the engine's own check would come after the rivals' first run.
    case = _case(bundle, names, {"batch": batch, "img_tokens": img_tokens, "txt_tokens": txt_tokens})
    for name in names:
        check_runnable(bundle, name)
    # TensorRT-RTX would compile a shape's kernels in the background, and the first rounds would time slower ones.
    engines = {name: Engine(bundle, name, specialize="eager") for name in names}
    inputs = {name: t.to(device) for name, t in case_inputs(case, bundle.contract, bundle.spec).items()}

    rivals: dict[str, tuple[str, Run]] = {}
    for name, engine in engines.items():
        how = execution_of(parse_target(name), bundle.precision)
        rivals |= _runs(engine, inputs, how)
    torch_rivals, not_run = _torch_rivals(bundle, inputs, device)
    rivals |= torch_rivals

    timings = time_interleaved(rivals, device, rounds=rounds, warmup=warmup)
    by_name = {t.name: t for t in timings}
    ratios = {
        f"{name} / {rival}": by_name[name].p50_ms / by_name[rival].p50_ms
        for name in names
        for rival in ("eager", "torch.compile")
        if rival in by_name
    }
    return LatencyReport(
        bundle.name,
        bundle.precision.label,
        bundle.manifest.fields["weights"]["origin"],
        case,
        timings,
        not_run,
        ratios,
        machine_facts(),
    )


def _runs(engine: Engine, inputs: dict[str, Tensor], how: str) -> dict[str, tuple[str, Run]]:
    """What is timed of an engine: a step. Of one in two parts, a step of a schedule, and a step with its conditioning.

    That is made once for a schedule, so the step that is compared with the rivals' is the one without.
    """
    if engine.bundle.split is None:
        return {engine.target: (how, partial(engine, inputs))}
    conditions = [spec.name for spec in engine.bundle.split.conditioning.inputs]
    schedule = {name: inputs[name] for name in conditions} | {"timestep": inputs["timestep"][None]}
    (step,) = engine.condition(schedule)
    others = {name: tensor for name, tensor in inputs.items() if name not in conditions}
    return {
        engine.target: (f"{how}; modulation made before", partial(engine, others, conditioning=step)),
        f"{engine.target} + modulation": (how, partial(engine, inputs)),
    }


def _device(names: Sequence[str]) -> torch.device:
    """Where all of these engines run; rivals share their inputs."""
    devices = {name: parse_target(name).device for name in names}
    if len(set(devices.values())) > 1:
        raise UsageError(
            "engines that are timed together run on one device",
            received=", ".join(f"{name} on {device}" for name, device in devices.items()),
            fix="time them in two runs",
        )
    return torch.device(devices[names[0]])


def _case(bundle: Bundle, names: Sequence[str], given: Mapping[str, int | None]) -> Case:
    """The input to time, checked against the contract and each engine's profiles.

    Args:
        given: sizes by axis; None for the optimum.
    """
    contract, asked = bundle.contract, {axis: size for axis, size in given.items() if size is not None}
    holding = (p for p in contract.profiles if all(p[a].min <= size <= p[a].max for a, size in asked.items()))
    optimum = next(holding, contract.ranges)
    sizes = {axis: asked.get(axis, optimum[axis].opt) for axis in given}
    contract.check({t.name: (t.dtype, t.shape(sizes)) for t in contract.inputs})
    for name in names:
        if parse_target(name).flavour is not None:
            choose_profile(engine_files(bundle, name)[0].profiles, sizes)
    tokens = sizes["img_tokens"]
    side = max(1, round(tokens**0.5))
    grid = fit_grid(side, side, tokens, tokens, contract.max_side)
    return Case(sizes["batch"], *grid, sizes["txt_tokens"], 500.0)


def _torch_rivals(
    bundle: Bundle, inputs: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, tuple[str, Run]], dict[str, str]]:
    """The rivals that can run here, and why the others cannot."""
    # PyTorch's 16-bit kernels on CPU are slower than fp32's on most machines: the fair rival there is fp32.
    dtype = getattr(torch, bundle.precision.dtype) if device.type == "cuda" else torch.float32
    short = _lacking_memory(bundle, dtype, device)
    if short:
        return {}, {"eager": short, "torch.compile": short}
    model = _eager_model(bundle, dtype, device)
    compute = {t.name for t in bundle.contract.inputs if t.dtype == bundle.precision.dtype}
    arguments = {n: t.to(dtype) if n in compute else t for n, t in inputs.items()}
    how = f"PyTorch {torch.__version__}, {str(dtype).removeprefix('torch.')} on {device.type}"

    def eager() -> object:
        with torch.inference_mode():
            return model(**arguments)

    compiled_model = torch.compile(model)

    def compiled() -> object:
        with torch.inference_mode():
            return compiled_model(**arguments)

    rivals: dict[str, tuple[str, Run]] = {"eager": (how, eager), "torch.compile": (how, compiled)}
    try:
        compiled()
    except Exception as error:  # no compiler, or a backend that this machine lacks
        said = next(iter(str(error).strip().splitlines()), "no message")
        del rivals["torch.compile"]
        return rivals, {"torch.compile": f"{type(error).__name__}: {said[:200]}"}
    return rivals, {}


def _lacking_memory(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the eager model is not loaded, or None where it fits."""
    needed = sum(p.numel for p in parameters(bundle.spec)) * dtype.itemsize
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed <= available:
        return None
    return f"its weights need {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"


def _eager_model(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The reference model with the bundle's own weights."""
    file = SafetensorsFile(bundle.file("weights.safetensors"))
    source: WeightSource = FileWeights(file, "bundle")
    if bundle.precision.quantized:
        schemes = {path: layer.scheme for path, layer in bundle_plan(bundle).linears.items()}
        source = QuantizedWeights(bundle.spec, file, schemes, "bundle")
    with torch.device("meta"):
        model = MMDiT(bundle.spec)
    state = {p.path: read_parameter(source, p, dtype).to(device) for p in parameters(bundle.spec)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()
