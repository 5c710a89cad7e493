"""Building engines: our graph against the plainly exported diffusers graph, with the same random weights.

TensorRT-RTX builds both for SM89, without a GPU, with the same optimization profile: the rival's image size is static,
because its model crops positions by Python integers, so ours gets that size too. Each build is a process of its own,
alternating in every round. Ours streams the engine to the disk and passes the fusion gate; the rival is built as in
NVIDIA's samples, serialized in memory and then written. Kernels per joint block are (kernels at depth a − at depth b) /
(a − b), so that embedders and head drop out; ours are also counted by block, as the manifest has them.

    python bench/engine_build.py            depth 24, fp16: time, memory, kernels, bytes, segments
    python bench/engine_build.py --large    also the 8.06 B SD3.5-Large checkpoint in segments
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from measure import run_job, write_result

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "dist" / "bench" / "engine_build"
SIDE, TXT = 32, (2, 77, 333)  # rows and columns of image tokens; text tokens
BATCH = (1, 2, 4)
SHALLOW, DEEP = 12, 24  # below 12, cutting our modulations apart is part of block 0's kernel: from 4 to 24 it is 21.05
SEGMENTS = 4
BOUNDS = {
    "build_time_ratio": 1.0,
    "peak_memory_ratio": 0.7,
    "kernels_per_joint_block": 21,
    "engine_over_weights_bytes": 1.02,
    "segments_kernels_over_whole": 1.02,
    "large_peak_gb": 8.0,
}


def prepare(depth: int, spec_heads: int) -> None:
    """Our graphs and weights (random, seed 0), and the rival's graph with these very weights."""
    from mmdit_deploy.checkpoint.weights import RandomWeights
    from mmdit_deploy.export import ExportRequest, export
    from mmdit_deploy.spec import ModelSpec, precision

    spec = ModelSpec(f"sd3-{depth}", depth, spec_heads)
    ours = WORK / f"ours-{depth}"
    request = ExportRequest(spec, RandomWeights(0), precision("fp16"), ("ort-cpu",), out=ours, force=True, verify=False)
    export(request)
    run_job([sys.executable, __file__, "--job", "rival-graph", "--depth", str(depth), "--heads", str(spec_heads)])


def rival_graph(depth: int, heads: int) -> None:
    """torch.onnx.export of diffusers' model, with the weights of our bundle."""
    import torch
    from rivals import export_plainly, save, sd3
    from safetensors.torch import load_file

    model = sd3(depth, heads, torch.float16)
    weights = load_file(WORK / f"ours-{depth}" / "weights.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"pos_embed.pos_embed"}:
        raise ValueError(f"the weights are not this model's: missing {missing}, unexpected {unexpected}")
    program, _ = export_plainly(model, torch.float16, side=SIDE)
    save(program, WORK / f"rival-{depth}")


def build_ours(depth: int, heads: int, segments: int) -> dict[str, Any]:
    """One build through `build_target`, gate included."""
    import onnx

    from mmdit_deploy.build import parse_target
    from mmdit_deploy.build.engines import build_target
    from mmdit_deploy.contract import Contract, Range
    from mmdit_deploy.model import calls
    from mmdit_deploy.model.partition import call_bytes, partition
    from mmdit_deploy.spec import ModelSpec, precision

    spec, fp16 = ModelSpec(f"sd3-{depth}", depth, heads), precision("fp16")
    tokens = SIDE * SIDE
    ranges = {"batch": Range(*BATCH), "img_tokens": Range(tokens, tokens, tokens), "txt_tokens": Range(*TXT)}
    folder = WORK / f"ours-{depth}"
    shutil.rmtree(folder / "engines", ignore_errors=True)
    standard = onnx.load(folder / "model.onnx", load_external_data=False)
    start = time.perf_counter()
    record, _ = build_target(
        parse_target("rtx:sm89"),
        spec,
        fp16,
        Contract.of(spec, fp16, ranges),
        standard,
        folder,
        partition(calls(spec), call_bytes(spec, fp16), segments),
        lambda line: print(line, file=sys.stderr),
    )
    return {
        "seconds": time.perf_counter() - start,
        "kernels": record.kernels,
        "kernels_by_type": dict(record.kernels_by_type),
        # the last block of SD3 is smaller: it leaves the text as it is
        "kernels_in_joint_blocks": [record.kernels_by_call[f"blocks.{i}"] for i in range(depth - 1)],
        "fused_attentions": sum(record.fused_attentions.values()),
        "bytes": record.nbytes,
        "weights_bytes": (folder / "weights.safetensors").stat().st_size,
    }


def build_rival(depth: int) -> dict[str, Any]:
    """As NVIDIA's samples do it: parse, build, write. Nothing of ours but the reader of the layer list."""
    import tensorrt_rtx as trt

    listed: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                listed.append(message)

    logger = Logger()
    start = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(WORK / f"rival-{depth}" / "model.onnx")):
        raise RuntimeError(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        dims = list(tensor.shape)
        names = {0: BATCH} | ({1: TXT} if tensor.name == "encoder_hidden_states" else {})
        shapes = [tuple(names[a][j] if a in names else d for a, d in enumerate(dims)) for j in range(3)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    file = WORK / f"rival-{depth}" / "rival.engine"
    file.write_bytes(engine)
    seconds = time.perf_counter() - start

    from mmdit_deploy.build.layers import kernels_by_type, parse_layer_list

    layers = parse_layer_list("".join(listed))
    kernels = kernels_by_type(layers)
    return {
        "seconds": seconds,
        "kernels": sum(kernels.values()),
        "kernels_by_type": kernels,
        "fused_attentions": sum(layer.is_fused_attention for layer in layers),
        "bytes": file.stat().st_size,
    }


def measured(job: str, depth: int, heads: int, segments: int = 1) -> dict[str, Any]:
    """A build in a process of its own, with its peak memory."""
    done = run_job(
        [sys.executable, __file__, "--job", job, "--depth", str(depth), "--heads", str(heads)]
        + ["--segments", str(segments)]
    )
    return {**json.loads(done.output.splitlines()[-1]), "peak_bytes": done.peak_bytes}


def large() -> dict[str, Any]:
    """The whole export of SD3.5-Large's checkpoint (random weights, real layout), built in segments."""
    import torch
    from make_checkpoint import CONFIGS, make_checkpoint

    checkpoint = ROOT / "dist" / "bench" / "sd3.5-large"
    if not checkpoint.exists():
        make_checkpoint(CONFIGS["sd3.5-large"], checkpoint, dtype=torch.float16, seed=0, shard_bytes=10e9)
    out = WORK / "large"
    start = time.perf_counter()
    done = run_job(
        [Path(sys.executable).with_name("mmdit-export"), checkpoint, "--fp16", "--target", "rtx:sm89"]
        + ["--segments", str(SEGMENTS), "--no-verify", "--force", "-o", out, "--json"]
    )
    data = json.loads(done.output)
    engine = data["engines"]["rtx:sm89"]
    shutil.rmtree(out)
    return {
        "parameters": data["parameters"],
        "weights_bytes": data["weights_bytes"],
        "seconds": time.perf_counter() - start,
        "peak_bytes": done.peak_bytes,
        "segments": [
            {key: segment[key] for key in ("bytes", "seconds")} | {"calls": [segment["calls"][0], segment["calls"][-1]]}
            for segment in engine["segments"]
        ],
        "engine_bytes": engine["bytes"],
        "kernels": engine["kernels"]["total"],
        "fused_attentions": sum(engine["fused_attentions"].values()),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--heads", type=int, default=24, help="the width is 64 times that")
    p.add_argument("--large", action="store_true")
    p.add_argument("--job", choices=["rival-graph", "ours", "rival"], help=argparse.SUPPRESS)
    p.add_argument("--depth", type=int, default=DEEP, help=argparse.SUPPRESS)
    p.add_argument("--segments", type=int, default=1, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job == "rival-graph":
        rival_graph(args.depth, args.heads)
    elif args.job:
        made = build_rival(args.depth) if args.job == "rival" else build_ours(args.depth, args.heads, args.segments)
        print(json.dumps(made))
    else:
        write_result("engine_build", compare(args))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    WORK.mkdir(parents=True, exist_ok=True)
    for depth in (SHALLOW, DEEP):
        prepare(depth, args.heads)
    rivals = {"ours": ("ours", 1), "rival": ("rival", 1), f"ours, {SEGMENTS} segments": ("ours", SEGMENTS)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for _ in range(args.rounds):
        for name, (job, segments) in rivals.items():
            runs[name].append(measured(job, DEEP, args.heads, segments))
            print(name, {k: v for k, v in runs[name][-1].items() if k != "kernels_by_type"}, file=sys.stderr)
    shallow = {job: measured(job, SHALLOW, args.heads) for job in ("ours", "rival")}
    summary = {
        name: {
            **made[-1],
            "seconds": median(run["seconds"] for run in made),
            "peak_bytes": median(run["peak_bytes"] for run in made),
            "rounds": [[round(run["seconds"], 1), run["peak_bytes"]] for run in made],
        }
        for name, made in runs.items()
    }
    for name in ("ours", "rival"):
        kernels = summary[name]["kernels"] - shallow[name]["kernels"]
        summary[name]["kernels_per_joint_block"] = kernels / (DEEP - SHALLOW)
    ours, rival, cut = summary.values()
    result: dict[str, Any] = {
        "depth": DEEP,
        "width": 64 * args.heads,
        "profile": {"batch": BATCH, "img_tokens": SIDE * SIDE, "txt_tokens": TXT},
        "builds": summary,
        "bounds": BOUNDS,
        "ratios": {
            "build_time_ratio": ours["seconds"] / rival["seconds"],
            "peak_memory_ratio": ours["peak_bytes"] / rival["peak_bytes"],
            "kernels_per_joint_block": ours["kernels_per_joint_block"],
            "kernels_in_any_joint_block": max(ours["kernels_in_joint_blocks"]),
            "rival_kernels_per_joint_block": rival["kernels_per_joint_block"],
            "fused_attentions": f"{ours['fused_attentions']} of {DEEP}",
            "engine_over_weights_bytes": ours["bytes"] / ours["weights_bytes"],
            "segments_kernels_over_whole": cut["kernels"] / ours["kernels"],
            "segments_time_ratio": cut["seconds"] / rival["seconds"],
            "segments_memory_ratio": cut["peak_bytes"] / rival["peak_bytes"],
        },
    }
    if args.large:
        result["large"] = large()
    return result


if __name__ == "__main__":
    main()
