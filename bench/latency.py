"""CPU latency of one step, and what attention costs in memory, next to what people run today.

    python bench/latency.py [--rounds N]

SD3-like, 6 blocks × 768, fp32, random weights (equal statistics, not equal values: time does not depend on them),
batch 1, 1024 + 77 tokens; then 4096 + 77. All rivals are interleaved in one process with two threads each:

- eager: diffusers' SD3Transformer2DModel, and the same through torch.compile
- plain ORT: that model through torch.onnx.export (opset 23, and the exporter's default of 18), in ONNX Runtime as it is
- OpenVINO: the opset-23 graph, held to fp32 (by default it computes in bf16 on CPUs that can: timed too, not a rival,
  since it does not compute fp32)

"arithmetic alone" is the floor of fp32 on ONNX Runtime here: the same matrix products and nothing else, each shape
timed by itself in ONNX Runtime's own kernel and added up.

Attention memory: peak RssAnon of a process that loads a graph and runs one step, above the same at 64 image tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measure import interleaved, p50_p90, run_job, write_result
from rivals import export_plainly, save, sd3

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.runtime import open_session
from mmdit_deploy.spec import ModelSpec, precision

HEADS, DEPTH, TXT_TOKENS = 12, 6, 77
SIDES = (32, 64)  # 1024 and 4096 image tokens
MEMORY_SIDES = (8, 32, 48, 64, 80)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--one-step", nargs=3, metavar=("GRAPH", "KIND", "SIDE"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one_step:
        _one_step(Path(args.one_step[0]), args.one_step[1], int(args.one_step[2]))
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), args.rounds)


def _run(folder: Path, rounds: int) -> None:
    spec = ModelSpec("bench", depth=DEPTH, num_heads=HEADS)
    ours = folder / "ours"
    export(
        ExportRequest(
            spec,
            RandomWeights(0),
            precision("fp32"),
            out=ours,
            verify=False,
            ranges={"img_tokens": Range(16, 1024, 16384)},
        )
    )
    model = sd3(DEPTH, HEADS, torch.float32)

    def plain(opset: int, side: int) -> Path:
        """The rival's graph for one image size, made when it is first needed."""
        target = folder / f"plain-{opset}-{side}"
        if not target.exists():
            save(export_plainly(model, torch.float32, opset, side)[0], target)
        return target / "model.onnx"

    timings: dict[str, Any] = {}
    for side in SIDES:
        rivals = _rivals(model, ours / "model.ort.onnx", {n: plain(n, side) for n in (23, 18)}, side)
        times = interleaved(rivals, rounds if side == SIDES[0] else max(3, rounds // 3))
        figures = {name: p50_p90(seconds) for name, seconds in times.items()}
        mine = figures["ours"][0]
        floor = _arithmetic_seconds(side * side)
        print(f"{side * side} + {TXT_TOKENS} tokens:")
        for name, (p50, p90) in figures.items():
            print(f"  {name:24s} p50 {p50 * 1e3:7.0f} ms  p90 {p90 * 1e3:7.0f} ms   ours / it {mine / p50:.3f}")
        print(f"  {'arithmetic alone':24s}     {floor * 1e3:7.0f} ms                 ours / it {mine / floor:.3f}")
        timings[f"{side * side}+{TXT_TOKENS}"] = {
            "p50_p90_ms": {name: [v * 1e3 for v in pair] for name, pair in figures.items()},
            "arithmetic_alone_ms": floor * 1e3,
            "ours_over": {name: mine / pair[0] for name, pair in figures.items()},
        }

    memory: dict[str, dict[int, float]] = {}
    for name in ("ours", "plain ORT (opset 23)"):
        peaks = {}
        for side in MEMORY_SIDES:
            graph, kind = (ours / "model.ort.onnx", "tokens") if name == "ours" else (plain(23, side), "latents")
            job = run_job([sys.executable, __file__, "--one-step", graph, kind, str(side)])
            peaks[side] = job.peak_bytes / 1e6
        memory[name] = {side * side: peaks[side] - peaks[MEMORY_SIDES[0]] for side in MEMORY_SIDES[1:]}
        print(
            f"memory of a step above 64 tokens, {name}: "
            + ", ".join(f"{n} tokens {mb:.0f} MB" for n, mb in memory[name].items())
        )
    exponents = {name: _exponent(by_tokens) for name, by_tokens in memory.items()}
    print("memory grows as tokens to the power of " + ", ".join(f"{name} {e:.2f}" for name, e in exponents.items()))
    write_result("latency", {"timings": timings, "memory_mb": memory, "memory_exponent": exponents, "rounds": rounds})


def _arithmetic_seconds(img_tokens: int) -> float:
    """Sum over the model's matrix products of the median time of each."""
    width, tokens = 64 * HEADS, img_tokens + TXT_TOKENS
    layers = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    products: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [((img_tokens, k), (k, n), DEPTH) for k, n in layers]
    products += [((TXT_TOKENS, k), (k, n), DEPTH - (i > 0)) for i, (k, n) in enumerate(layers)]
    products += [((TXT_TOKENS, 4096), (4096, width), 1)]
    products += [((HEADS, tokens, 64), (HEADS, 64, tokens), DEPTH)]
    products += [((HEADS, tokens, tokens), (HEADS, tokens, 64), DEPTH)]
    total = 0.0
    for left, right, count in products:
        run = partial(_product_session(left, right).run, None, {"a": np.ones(left, np.float32)})
        times = interleaved({"": run}, 7)[""]
        total += count * p50_p90(times)[0]
    return total


def _product_session(left: tuple[int, ...], right: tuple[int, ...]) -> Any:
    weight = np.random.default_rng(0).standard_normal(right, dtype=np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, left)],
        [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, (*left[:-1], right[-1]))],
        [onnx.numpy_helper.from_array(weight, "b")],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    return open_session(model.SerializeToString(), "ort-cpu")


def _rivals(model: torch.nn.Module, ours: Path, plain: dict[int, Path], side: int) -> dict[str, Callable[[], object]]:
    import openvino

    latents, tokens = _inputs("latents", side), _inputs("tokens", side)
    tensors = {name: torch.from_numpy(value) for name, value in latents.items()}
    sessions = {
        name: open_session(path, "ort-cpu") for name, path in (("ours", ours), (23, plain[23]), (18, plain[18]))
    }
    core = openvino.Core()
    requests = {
        hint: core.compile_model(
            plain[23],
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                **({"INFERENCE_PRECISION_HINT": "f32"} if hint == "fp32" else {}),
            },
        ).create_infer_request()
        for hint in ("fp32", "default")
    }
    compiled_model = torch.compile(model)

    def eager(module: Callable[..., object] = model) -> object:
        with torch.inference_mode():
            return module(**tensors, return_dict=False)

    return {
        "ours": lambda: sessions["ours"].run(None, tokens),
        "eager": eager,
        "torch.compile": lambda: eager(compiled_model),
        "plain ORT (opset 23)": lambda: sessions[23].run(None, latents),
        "plain ORT (opset 18)": lambda: sessions[18].run(None, latents),
        "OpenVINO fp32": lambda: requests["fp32"].infer(latents),
        "OpenVINO default (bf16)": lambda: requests["default"].infer(latents),
    }


def _inputs(kind: str, side: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    common = {
        "encoder_hidden_states": rng.standard_normal((1, TXT_TOKENS, 4096), dtype=np.float32),
        "pooled_projections": rng.standard_normal((1, 2048), dtype=np.float32),
        "timestep": np.array([500.0], dtype=np.float32),
    }
    if kind == "latents":
        return {"hidden_states": rng.standard_normal((1, 16, 2 * side, 2 * side), dtype=np.float32), **common}
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
    tokens = rng.standard_normal((1, side * side, 64), dtype=np.float32)
    return {"hidden_states": tokens, "img_ids": grid.astype(np.float32), **common}


def _one_step(graph: Path, kind: str, side: int) -> None:
    open_session(graph, "ort-cpu").run(None, _inputs(kind, side))
    print(json.dumps({"done": True}))


def _exponent(by_tokens: dict[int, float]) -> float:
    """The slope of log memory over log tokens (image and text)."""
    tokens = np.log([n + TXT_TOKENS for n in by_tokens])
    return float(np.polyfit(tokens, np.log(list(by_tokens.values())), 1)[0])


if __name__ == "__main__":
    main()
