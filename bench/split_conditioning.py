"""What `--split-conditioning` saves: weights in the loop, bytes per step of TensorRT's kernels, and time on a CPU.

    python bench/split_conditioning.py [--rounds N] [--only bytes,time,memory,tensorrt] [--work DIR]

- bytes: of the weights file, what the graphs of each part read (each byte once), of presets at full size: graphs alone,
  no weights are written.
- time: a step on ONNX Runtime's CPU, two models 768 wide in fp32 (6 SD3 blocks; 2 joint and 4 single FLUX.1 blocks) at
  256, 1024 and 4096 image tokens and 77 of text, batch 1. Rivals in one process, interleaved: the model in one
  part; in two, with the modulation made before, as in a loop; in two with all inputs, so that it is made in the step;
  and the modulation of 28 steps in one call. A schedule of 28 steps is that and 28 steps. The ratio is the median over
  rounds (at 4096 tokens, a third of them) of the ratio to the model in one part in the same round. Two parts win
  everywhere if each of a step, a schedule and a call with all inputs is faster.
- memory: RssAnon of a process in its loop, after two steps: in one part, in two, and in two with the conditioning
  released.
- tensorrt: engines for SM89, built and not run, at the presets' real width in fp16, 4 blocks of SD3-Medium and 1 + 2 of
  FLUX.1: kernels, and the bytes that a step moves at the opt shape, from the layer lists.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import torch
from measure import _anonymous_bytes, interleaved, p50_p90, run_job, write_result
from torch import Tensor

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.build.layers_file import read_layers
from mmdit_deploy.build.traffic import traffic_of
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.families import preset
from mmdit_deploy.graph.weight_spans import weight_bytes
from mmdit_deploy.runtime import Engine
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs

PRESETS = ("sd3-medium", "sd3.5-medium", "sd3.5-large", "flux1-dev", "flux2-dev", "qwen-image", "qwen-image-edit-2511")
TIMED = {
    "sd3": ModelSpec("bench-sd3", depth=6, num_heads=12),
    "flux1": dataclasses.replace(preset("flux1-dev"), name="bench-flux1", depth=2, single_depth=4, num_heads=6),
}
BUILT = {
    "sd3-medium": dataclasses.replace(preset("sd3-medium"), name="bench-sd3-medium", depth=4),
    "flux1-dev": dataclasses.replace(preset("flux1-dev"), name="bench-flux1-dev", depth=1, single_depth=2),
}
SIDES, BATCHES, TXT_TOKENS, STEPS = (16, 32, 64), (1,), 77, 28
RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(256, 1024, 4096), "txt_tokens": Range(2, 77, 77)}
ONE, LOOP, ALL, SCHEDULE = "in one part", "in two", "in two, all inputs", f"modulation of {STEPS} steps"
MODES = {"in one part": (False, "resident"), "in two": (True, "resident"), "in two, released": (True, "released")}
RTX, SM89 = "rtx:sm89", "engines/rtx-sm89"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--only", default="bytes,time,memory,tensorrt", help="comma-separated; without all, nothing is kept")
    p.add_argument("--work", type=Path, help="scratch folder, 3 GB")
    p.add_argument("--loop", nargs=2, metavar=("BUNDLE", "CONDITIONING"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.loop:
        _loop(Path(args.loop[0]), args.loop[1])
        return
    parts: dict[str, Callable[[Path], Any]] = {
        "bytes": _bytes,
        "time": partial(_time, rounds=args.rounds),
        "memory": _memory,
        "tensorrt": _tensorrt,
    }
    chosen = args.only.split(",")
    made = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for name in chosen:
            made[name] = parts[name](Path(folder) / name)
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
    if chosen == list(parts):
        write_result("split_conditioning", {"rounds": args.rounds, **made})


def _export(spec: ModelSpec, out: Path, *, split: bool, **options: Any) -> EngineRecord | None:
    """A bundle with random weights, not verified; the record of its TensorRT engine, where it has one."""
    request = ExportRequest(
        spec, RandomWeights(0), out=out, verify=False, split_conditioning=split, **{"targets": ("ort-cpu",), **options}
    )
    return export(request).engines.get(RTX)


def _bytes(folder: Path) -> dict[str, Any]:
    """Weights of each part, by preset."""
    made = {}
    for name in PRESETS:
        out = folder / name
        _export(preset(name), out, split=True, precision=precision("fp16"), graph_only=True)
        parts = {
            part: weight_bytes(onnx.load(out / f"{part}.ort.onnx", load_external_data=False))
            for part in ("conditioning", "trunk")
        }
        total = sum(parts.values())
        share = parts["conditioning"] / total
        print(f"{name:22s} in one part {total / 1e9:6.2f} GB, the trunk {parts['trunk'] / 1e9:6.2f} GB: −{share:.1%}")
        made[name] = {**parts, "less_in_the_loop": share}
    return made


def _time(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians and ratios by model, batch and image tokens."""
    made: dict[str, Any] = {}
    worst = 0.0
    for name, spec in TIMED.items():
        for split in (False, True):
            _export(spec, folder / f"{name}-{split}", split=split, precision=precision("fp32"), ranges=RANGES)
        with Engine.load(folder / f"{name}-False") as one, Engine.load(folder / f"{name}-True") as two:
            for batch in BATCHES:
                for side in SIDES:
                    inputs = case_inputs(Case(batch, side, side, TXT_TOKENS, 500.0), one.contract, spec)
                    few = rounds if side < SIDES[-1] else max(3, rounds // 3)
                    figures = _figures(interleaved(_rivals(one, two, inputs), few))
                    worst = max(worst, *figures["ratios"].values(), figures["schedule_ratio"])
                    what = f"{name}, batch {batch}, {side * side} + {TXT_TOKENS} tokens"
                    made[what] = figures
                    print(
                        f"{what}: one part {figures['p50_ms'][ONE]:.1f} ms, two {figures['p50_ms'][LOOP]:.1f} ms "
                        f"(× {figures['ratios'][LOOP]:.3f}; all inputs × {figures['ratios'][ALL]:.3f}), "
                        f"{STEPS} steps × {figures['schedule_ratio']:.3f}"
                    )
    outcome = "wins everywhere" if worst < 1 else "does not win everywhere"
    print(f"the worst ratio of a step, a schedule or a call with all inputs: {worst:.3f}; in two parts {outcome}")
    return {"cases": made, "worst_ratio": worst, "wins_everywhere": worst < 1}


def _rivals(one: Engine, two: Engine, inputs: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    conditions = [n for n in ("timestep", "pooled_projections", "guidance") if n in inputs]
    others = {name: tensor for name, tensor in inputs.items() if name not in conditions}
    times = inputs["timestep"] - torch.linspace(0, 400, STEPS)[:, None] / one.bundle.spec.time_scale
    schedule = {name: inputs[name] for name in conditions} | {"timestep": times}
    step = two.condition(schedule)[0]
    return {
        ONE: partial(one, inputs),
        LOOP: partial(two, others, conditioning=step),
        ALL: partial(two, inputs),
        SCHEDULE: partial(two.condition, schedule),
    }


def _figures(times: Mapping[str, list[float]]) -> dict[str, Any]:
    def ratio(name: str) -> float:
        return median(a / b for a, b in zip(times[name], times[ONE], strict=True))

    scheduled = [
        (made + STEPS * step) / (STEPS * whole)
        for made, step, whole in zip(times[SCHEDULE], times[LOOP], times[ONE], strict=True)
    ]
    p50_p90_ms = {name: [v * 1e3 for v in p50_p90(seconds)] for name, seconds in times.items()}
    return {
        "p50_ms": {name: pair[0] for name, pair in p50_p90_ms.items()},
        "p90_ms": {name: pair[1] for name, pair in p50_p90_ms.items()},
        "ratios": {name: ratio(name) for name in (LOOP, ALL)},
        "schedule_ratio": median(scheduled),
    }


def _memory(folder: Path) -> dict[str, Any]:
    """Anonymous memory of a process in its loop, by model and mode."""
    made: dict[str, Any] = {}
    for name, spec in TIMED.items():
        for split in (False, True):
            _export(spec, folder / f"{name}-{split}", split=split, precision=precision("fp32"), ranges=RANGES)
        made[name] = {}
        for mode, (split, conditioning) in MODES.items():
            job = run_job([sys.executable, __file__, "--loop", folder / f"{name}-{split}", conditioning])
            made[name][mode] = int(job.output.split()[-1])
            print(f"{name}, {mode}: {made[name][mode] / 1e6:.0f} MB in the loop")
    return made


def _loop(bundle: Path, conditioning: str) -> None:
    """A schedule of two steps, and then what the process holds."""
    with Engine.load(bundle, conditioning=conditioning) as engine:
        inputs = case_inputs(Case(1, 16, 16, TXT_TOKENS, 500.0), engine.contract, engine.bundle.spec)
        conditions = [n for n in ("timestep", "pooled_projections", "guidance") if n in inputs]
        table = engine.condition(
            {n: inputs[n] for n in conditions} | {"timestep": inputs["timestep"].expand(2, -1).contiguous()}
        )
        others = {name: tensor for name, tensor in inputs.items() if name not in conditions}
        for step in table:
            engine(others, conditioning=step)
        print(_anonymous_bytes(os.getpid()))


def _tensorrt(folder: Path) -> dict[str, Any]:
    """Kernels and bytes of a step, in one part and in two, by model."""
    made: dict[str, Any] = {}
    for name, spec in BUILT.items():
        found: dict[str, Any] = {}
        for what, split in (("in one part", False), ("trunk", True)):
            out = folder / f"{name}-{split}"
            _export(spec, out, split=split, precision=precision("fp16"), targets=(RTX,))
            found[what] = _listed(out / SM89)
            if split:
                found["conditioning"] = _listed(out / SM89 / "conditioning")
            shutil.rmtree(out)
        whole, trunk = found["in one part"], found["trunk"]
        found["weights_less"] = 1 - trunk["weights"] / whole["weights"]
        found["bytes_less"] = 1 - trunk["bytes"] / whole["bytes"]
        blocks = {c: (n, trunk["kernels_by_call"][c]) for c, n in whole["kernels_by_call"].items() if "blocks." in c}
        found["kernels_rose_in"] = [call for call, (before, after) in blocks.items() if after > before]
        print(
            f"{name}, {spec.depth} + {spec.single_depth} blocks: {whole['kernels']} → {trunk['kernels']} kernels, "
            f"weights {whole['weights'] / 1e6:.0f} → {trunk['weights'] / 1e6:.0f} MB (−{found['weights_less']:.1%}), "
            f"all bytes {whole['bytes'] / 1e9:.2f} → {trunk['bytes'] / 1e9:.2f} GB (−{found['bytes_less']:.1%}); "
            f"conditioning {found['conditioning']['kernels']} kernels; more in {found['kernels_rose_in'] or 'no block'}"
        )
        made[name] = found
    return made


def _listed(folder: Path) -> dict[str, Any]:
    record, files = read_layers(folder / "layers.json")
    moved = traffic_of(layer for file in files for layer in file.layers if layer.is_kernel)
    return {
        "kernels": record.kernels,
        "kernels_by_call": dict(record.kernels_by_call),
        "opt": {axis: sizes.opt for axis, sizes in record.profiles[0].items()},
        **moved.to_json(),
    }


if __name__ == "__main__":
    main()
