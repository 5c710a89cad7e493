"""ONNX Runtime on CPU before and after `mmdit-optimize --dialect ort`: time and memory of a step of a plain export.

    python bench/optimize_cpu.py [--rounds N] [--steps N] [--heads N] [--depth N] [--side N]…

An SD3-like model (diffusers' SD3Transformer2DModel, 6 blocks × 768, fp32, random weights, batch 1, 77 text tokens)
through torch's dynamo exporter (opset 18, as it is by default, and 23) and its TorchScript exporter (opset 17). Each
graph, as it was exported and optimized, runs in a process of its own, one after the other in every round, so that drift
hits all alike; ONNX Runtime's own optimizations are on for all.

Peak memory is the sampled RssAnon of the whole process. Memory of a step is the peak during the first step above what
the loaded session holds; how it grows with the tokens says whether an attention holds its scores (power of 2) or not
(power of 1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TXT_TOKENS = 77
SIDES = (32, 48, 64)  # 1024, 2304 and 4096 image tokens
EXPORTS = (("dynamo", 18), ("dynamo", 23), ("torchscript", 17))
SAMPLE_SECONDS = 0.005


def main() -> None:
    """Parse arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    p.add_argument("--depth", type=int, default=6)
    p.add_argument("--heads", type=int, default=12)
    p.add_argument("--side", type=int, action="append", help="rows and columns of image tokens")
    p.add_argument("--dialect", default="ort")
    p.add_argument("--one-process", nargs=4, metavar=("GRAPH", "SIDE", "STEPS", "SAMPLE"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one_process:
        graph, side, steps, sample = args.one_process
        print(json.dumps(_one_process(Path(graph), int(side), int(steps), Path(sample))))
        return
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), args)


def _run(folder: Path, args: argparse.Namespace) -> None:
    from measure import p50_p90, write_result

    sides = args.side or SIDES
    results: dict[str, Any] = {}
    for exporter, opset in EXPORTS:
        name = f"{exporter} {opset}"
        results[name] = by_tokens = {}
        memory: dict[str, dict[int, float]] = {"before": {}, "after": {}}
        for side in sides:
            graphs = _graphs(folder / f"{exporter}-{opset}-{side}", exporter, opset, side, args)
            figures = _measure(graphs, side, args)
            tokens = side * side + TXT_TOKENS
            for which, runs in figures.items():
                memory[which][tokens] = max(r["step_bytes"] for r in runs) / 1e6
            seconds = {which: p50_p90([s for r in runs for s in r["seconds"]]) for which, runs in figures.items()}
            peaks = {which: max(r["peak_bytes"] for r in runs) / 1e6 for which, runs in figures.items()}
            samples = [np.load(runs[0]["sample"]) for runs in figures.values()]
            by_tokens[tokens] = {
                "p50_p90_ms": {which: [v * 1e3 for v in pair] for which, pair in seconds.items()},
                "time_ratio": seconds["after"][0] / seconds["before"][0],
                "peak_mb": peaks,
                "step_mb": {which: memory[which][tokens] for which in memory},
                "rel_l2": float(np.linalg.norm(samples[1] - samples[0]) / np.linalg.norm(samples[0])),
            }
            _print(name, tokens, by_tokens[tokens])
            for file in (folder / f"{exporter}-{opset}-{side}").iterdir():
                file.unlink()
        exponents = {which: _exponent(by_size) for which, by_size in memory.items() if len(by_size) > 1}
        by_tokens["step_memory_exponent"] = exponents
        print(f"{name}: memory of a step grows as tokens to the power of", exponents)
    whole = (args.depth, args.heads, tuple(sides)) == (6, 12, SIDES)
    if whole:
        shape = {"depth": args.depth, "heads": args.heads, "txt_tokens": TXT_TOKENS, "dialect": args.dialect}
        runs = {"rounds": args.rounds, "steps": args.steps}
        write_result("optimize_cpu", {**shape, **runs, "results": results})


def _graphs(folder: Path, exporter: str, opset: int, side: int, args: argparse.Namespace) -> dict[str, Path]:
    """The graph as exported, and optimized, beside the same weights."""
    import torch
    from rivals import export_plainly, sd3

    from mmdit_deploy.graph.optimize import optimize_file

    folder.mkdir()
    before, after = folder / "before.onnx", folder / "after.onnx"
    torch.manual_seed(0)
    model = sd3(args.depth, args.heads, torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms begin as ones, biases as zeros
            parameter.data.add_(torch.randn_like(parameter) / 5)
    if exporter == "dynamo":
        export_plainly(model, torch.float32, opset, side)[0].save(before, external_data=True)
    else:
        _torchscript(model, opset, side, before)
    optimize_file(before, after, args.dialect)
    return {"before": before, "after": after}


def _torchscript(model: Any, opset: int, side: int, path: Path) -> None:
    import warnings

    import onnx
    import torch
    from rivals import INPUTS, SD3ForExport

    inputs = {name: torch.from_numpy(value) for name, value in _inputs(side).items()}
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in INPUTS}
    axes["encoder_hidden_states"][1] = "txt_tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            SD3ForExport(model),
            tuple(inputs[name] for name in INPUTS),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(INPUTS),
            output_names=["sample"],
            dynamic_axes=axes,
        )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin")


def _measure(graphs: Mapping[str, Path], side: int, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each process says, by graph; the graphs take turns."""
    from measure import run_job

    figures: dict[str, list[dict[str, Any]]] = {which: [] for which in graphs}
    for _, (which, graph) in itertools.product(range(args.rounds), graphs.items()):
        sample = graph.with_suffix(".npy")
        job = run_job([sys.executable, __file__, "--one-process", graph, str(side), str(args.steps), sample])
        figures[which].append({**json.loads(job.output), "peak_bytes": job.peak_bytes, "sample": str(sample)})
    return figures


def _one_process(graph: Path, side: int, steps: int, sample: Path) -> dict[str, Any]:
    """Load, run one step for its memory, then some for their time. Only ONNX Runtime and NumPy are imported."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = _inputs(side)
    loaded = _anonymous_bytes()
    with _Peak() as peak:
        (output, *_) = session.run(None, inputs)
    np.save(sample, output)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        session.run(None, inputs)
        seconds.append(time.perf_counter() - start)
    return {"step_bytes": peak.nbytes - loaded, "seconds": seconds}


class _Peak:
    """The largest RssAnon of this process while it is open."""

    def __enter__(self) -> _Peak:
        self.nbytes = _anonymous_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, _anonymous_bytes())  # ONNX Runtime keeps what it took

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.nbytes = max(self.nbytes, _anonymous_bytes())


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def _inputs(side: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "hidden_states": rng.standard_normal((1, 16, 2 * side, 2 * side), dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((1, TXT_TOKENS, 4096), dtype=np.float32),
        "pooled_projections": rng.standard_normal((1, 2048), dtype=np.float32),
        "timestep": np.array([500.0], dtype=np.float32),
    }


def _exponent(by_tokens: Mapping[int, float]) -> float:
    """The slope of log memory over log tokens."""
    return float(np.polyfit(np.log(list(by_tokens)), np.log(list(by_tokens.values())), 1)[0])


def _print(name: str, tokens: int, figures: Mapping[str, Any]) -> None:
    def pair(key: str, unit: str, values: Sequence[float]) -> str:
        return f"{key} {values[0]:.0f} → {values[1]:.0f} {unit}"

    medians = [pair_[0] for pair_ in figures["p50_p90_ms"].values()]
    parts = (
        f"{pair('time', 'ms', medians)} (× {figures['time_ratio']:.3f})",
        pair("peak", "MB", list(figures["peak_mb"].values())),
        pair("of a step", "MB", list(figures["step_mb"].values())),
        f"relative L2 {figures['rel_l2']:.0e}",
    )
    print(f"{name}, {tokens} tokens: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
