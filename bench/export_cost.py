"""What an export costs: graph work, memory, time, and the size of the graph, next to torch's own exporter.

    python bench/export_cost.py [--work DIR] [--large]

Rival: `torch.onnx.export(dynamo=True, opset_version=23)` of diffusers' SD3Transformer2DModel, in the same run, each job
in a process of its own, ours and theirs in turn. Graph work is the exporter call alone against our trace, assemble,
fuse and lower (two graphs: standard and ONNX Runtime's); both after imports. The checkpoint is SD3-Medium's
configuration (2.03 B parameters) in diffusers' own layout, fp16, random weights; `--large` adds SD3.5-Large (8.06 B,
needs 45 GB of disk). Both read a checkpoint that was just written or read, so mostly from the file cache. Medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

import torch
from make_checkpoint import CONFIGS, make_checkpoint
from measure import Job, run_job, write_result

BENCH = Path(__file__).parent
GRAPH_WORK = """
import json, sys, time
from mmdit_deploy.checkpoint.weights import weights_layout
from mmdit_deploy.contract import Contract
from mmdit_deploy.graph.pipeline import build_graphs
from mmdit_deploy.spec import ModelSpec, precision
import torch, torch.onnx, onnxscript
spec = ModelSpec("bench", depth=int(sys.argv[1]), num_heads=24)
fp16 = precision("fp16")
start = time.perf_counter()
graphs = build_graphs(spec, Contract.of(spec, fp16), fp16, weights_layout(spec, torch.float16), dialects=("ort",))
seconds = time.perf_counter() - start
print(json.dumps({"graph_seconds": seconds, "stages": dict(graphs.seconds), "model_bytes": graphs.standard.ByteSize()}))
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("dist/bench"), help="scratch folder, 10 GB (45 GB with --large)")
    p.add_argument("--large", action="store_true", help="also the 8.06 B checkpoint")
    p.add_argument("--rounds", type=int, default=3, help="rounds, ours and theirs in turn (default 3)")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    python = sys.executable
    graph: dict[str, list[dict[str, float]]] = {"ours 24": [], "ours 2": [], "rival 24": [], "rival 2": []}
    for _ in range(args.rounds):
        for depth in (24, 2):
            graph[f"ours {depth}"].append(_json(run_job([python, "-c", GRAPH_WORK, str(depth)])))
            rival = run_job([python, BENCH / "rivals.py", "graph", "--depth", str(depth)])
            graph[f"rival {depth}"].append(_json(rival))
    typical = {name: median(r["graph_seconds"] for r in runs) for name, runs in graph.items()}
    model_bytes = graph["ours 24"][0]["model_bytes"]
    for depth in (24, 2):
        ours_s, rival_s = typical[f"ours {depth}"], typical[f"rival {depth}"]
        print(f"graph work, depth {depth}: ours {ours_s:.1f} s, torch.onnx.export {rival_s:.1f} s")

    checkpoint = _checkpoint(args.work, "sd3-medium")
    ours: list[Job] = []
    theirs: list[Job] = []
    for _ in range(args.rounds):
        ours.append(_export(checkpoint, args.work / "ours"))
        shutil.rmtree(args.work / "ours")
        rival = [python, BENCH / "rivals.py", "export", "--checkpoint", checkpoint, "--out", args.work / "theirs"]
        theirs.append(run_job(rival))
        shutil.rmtree(args.work / "theirs")
        _row("SD3-Medium fp16 → files", ours[-1])
        _row("  torch.onnx.export + save", theirs[-1])
    seconds = {name: median(j.seconds for j in jobs) for name, jobs in (("ours", ours), ("rival", theirs))}
    peak = {name: max(j.peak_bytes for j in jobs) / 1e9 for name, jobs in (("ours", ours), ("rival", theirs))}
    rival_bytes = _json(theirs[0])["model_bytes"]
    large = None
    if args.large:
        shutil.rmtree(checkpoint)
        checkpoint = _checkpoint(args.work, "sd3.5-large")
        large = _export(checkpoint, args.work / "large")
        shutil.rmtree(args.work / "large")
        _row("SD3.5-Large fp16 → files", large)
    print(f"model.onnx at depth 24: ours {model_bytes / 1e3:.0f} kB, rival {rival_bytes / 1e3:.0f} kB")

    write_result(
        "export_cost",
        {
            "rounds": args.rounds,
            "graph_work_seconds": typical,
            "graph_work_runs": graph,
            "graph_work_over_rival": typical["ours 24"] / typical["rival 24"],
            "graph_work_depth_24_over_2": typical["ours 24"] / typical["ours 2"],
            "checkpoint_seconds": seconds,
            "checkpoint_runs": {"ours": [j.seconds for j in ours], "rival": [j.seconds for j in theirs]},
            "checkpoint_time_over_rival": seconds["ours"] / seconds["rival"],
            "checkpoint_peak_gb": peak,
            "large_checkpoint": large and {"seconds": large.seconds, "peak_gb": large.peak_bytes / 1e9},
            "model_onnx_bytes": {"ours": model_bytes, "rival": rival_bytes},
        },
    )


def _checkpoint(work: Path, name: str) -> Path:
    path = work / name
    if not path.exists():
        make_checkpoint(CONFIGS[name], path, dtype=torch.float16, seed=0, shard_bytes=10e9)
    return path


def _export(checkpoint: Path, out: Path) -> Job:
    command = "import sys; from mmdit_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
    # No TensorRT engine: it is the graph and the weights that are compared.
    options = ["--fp16", "--target", "ort-cpu", "--no-verify", "--force", "-o", out]
    return run_job([sys.executable, "-c", command, checkpoint, *options])


def _json(job: Job) -> dict[str, float]:
    data: dict[str, float] = json.loads(job.output.strip().splitlines()[-1])
    return data


def _row(name: str, job: Job) -> None:
    print(f"{name:28s} {job.seconds:7.1f} s   peak {job.peak_bytes / 1e9:5.2f} GB", flush=True)


if __name__ == "__main__":
    main()
