"""What a call of an engine costs besides the runtime's own work: `Engine` over bare ONNX Runtime with IO binding.

    python bench/call_overhead.py [--rounds N]

A tiny model (1 block × 64, fp32, random weights, batch 1, 4 + 2 tokens), so that what surrounds the run shows. All
rivals call the same session, interleaved, on the same tensors:

- bound once: tensors were bound before, `run_with_iobinding` alone; the floor, which no caller with new tensors reaches
- bound anew: a new binding and a new output tensor in every call, and nothing else
- engine: `Engine.__call__`, which checks and returns new tensors; with outputs given; in numpy; and with a table of
  conditioning

The overhead is the median over rounds of the difference to the bare call of the same round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import p50_p90, write_result

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.families import position_ids
from mmdit_deploy.runtime import Engine
from mmdit_deploy.spec import ModelSpec, precision

SPEC = ModelSpec("overhead", depth=1, num_heads=1, txt_dim=16, pooled_dim=16)
GRID, TXT_TOKENS = (2, 2), 2
TARGET_US = 50.0
BOUND_ONCE, BOUND_ANEW = "bare ORT, bound once", "bare ORT, bound anew"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=3000)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranges = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 4, 64), "txt_tokens": Range(2, 2, 8)}
        out = Path(folder) / "bundle"
        export(ExportRequest(SPEC, RandomWeights(0), precision("fp32"), out=out, ranges=ranges, verify=False))
        with Engine.load(out, "ort-cpu") as engine:
            times = _interleaved(_rivals(engine), args.rounds)
    figures = {name: p50_p90(seconds) for name, seconds in times.items()}
    over: dict[str, dict[str, float]] = {}
    for name, (p50, p90) in figures.items():
        over[name] = {
            bare: median(a - b for a, b in zip(times[name], times[bare], strict=True)) * 1e6
            for bare in (BOUND_ONCE, BOUND_ANEW)
        }
        print(
            f"{name:24s} p50 {p50 * 1e6:6.1f} µs  p90 {p90 * 1e6:6.1f} µs   "
            f"over bound once {over[name][BOUND_ONCE]:+6.1f} µs (× {p50 / figures[BOUND_ONCE][0]:.3f}), "
            f"over bound anew {over[name][BOUND_ANEW]:+6.1f} µs"
        )
    worst = max(by_bare[BOUND_ONCE] for by_bare in over.values())
    print(f"the most over bare ONNX Runtime, bound once: {worst:.1f} µs (target: {TARGET_US:.0f})")
    write_result(
        "call_overhead",
        {
            "spec": SPEC.to_json(),
            "rounds": args.rounds,
            "p50_p90_us": {name: [v * 1e6 for v in pair] for name, pair in figures.items()},
            "over_us": over,
            "ratio_to_bound_once": {name: pair[0] / figures[BOUND_ONCE][0] for name, pair in figures.items()},
            "worst_us": worst,
            "target_us": TARGET_US,
        },
    )


def _rivals(engine: Engine) -> dict[str, Callable[[], object]]:
    session = engine._runner._session  # the very one: two sessions' thread pools would get into each other's way
    sizes = {"batch": 1, "img_tokens": GRID[0] * GRID[1], "txt_tokens": TXT_TOKENS}
    inputs = {t.name: torch.randn(t.shape(sizes)) for t in engine.contract.inputs}
    inputs["img_ids"] = torch.from_numpy(position_ids(SPEC, [GRID], TXT_TOKENS)[0])
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    (output,) = engine.contract.outputs
    given = torch.empty(output.shape(sizes))
    once = _bound(session, inputs, given)
    table = engine.condition({"timestep": torch.rand(4, 1), "pooled_projections": inputs["pooled_projections"]})
    others = {name: t for name, t in inputs.items() if name not in ("timestep", "pooled_projections")}

    def anew() -> object:
        made = torch.empty(given.shape)
        session.run_with_iobinding(_bound(session, inputs, made))
        return made

    session.run_with_iobinding(once)
    assert torch.equal(given, engine(inputs)["sample"])
    assert np.array_equal(given.numpy(), engine(arrays)["sample"])
    return {
        BOUND_ONCE: lambda: session.run_with_iobinding(once),
        BOUND_ANEW: anew,
        "engine": lambda: engine(inputs),
        "engine, outputs given": lambda: engine(inputs, outputs={"sample": given}),
        "engine, numpy": lambda: engine(arrays),
        "engine, table": lambda: engine(others, conditioning=table[1]),
    }


def _bound(session: object, inputs: dict[str, torch.Tensor], output: torch.Tensor) -> object:
    binding = session.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("sample", "cpu", 0, np.float32, tuple(output.shape), output.data_ptr())
    return binding


def _interleaved(rivals: dict[str, Callable[[], object]], rounds: int, warmup: int = 200) -> dict[str, list[float]]:
    """Seconds per call, all rivals once a round. The order turns, so that none always follows the same other."""
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            run = rivals[name]
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if index >= warmup:
                times[name].append(elapsed)
    return times


if __name__ == "__main__":
    main()
