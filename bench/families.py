"""Every family at real size: the graph of the whole model, and a slice of it built by TensorRT-RTX.

    python bench/families.py                  the three largest
    python bench/families.py flux2-klein-4b   others, by the names of their presets
    python bench/families.py --whole          also all of FLUX.2 klein 4B, from one file in the original layout

The graph is `mmdit-export --preset NAME --bf16 --graph-only`: time and peak memory of the process, start and imports
included, and the kinds of blocks that were traced. The slice has real width, two joint blocks and, where the family has
any, two single ones, with random weights: TensorRT-RTX builds it for SM89 in fp16, and the fusion gate reads from the
engine's own list of kernels that every attention and norm is fused. Nothing is executed. A single run each.

`--whole` makes a checkpoint of 7.75 GB with random weights (`make_checkpoint.py`), and exports it in bf16 for SM89 with
`mmdit-export FILE --no-verify`: time and peak memory from the file to the engine. It needs 25 GB of disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import run_job, write_result

if TYPE_CHECKING:
    from mmdit_deploy.build import EngineRecord

EXPORT = "import sys; from mmdit_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
WORK = Path(__file__).resolve().parents[1] / "dist" / "bench" / "families"
NAMES = ("flux1-dev", "qwen-image", "flux2-dev")
WHOLE = "flux2-klein-4b"
BLOCKS = 2
MAX_SECONDS, MAX_GB = 40, 1.5  # of a graph


def build_slice(name: str) -> None:
    """Export a slice, and print what was built."""
    from mmdit_deploy.checkpoint.weights import RandomWeights
    from mmdit_deploy.export import ExportRequest, export
    from mmdit_deploy.families import preset
    from mmdit_deploy.spec import precision

    whole = preset(name)
    spec = dataclasses.replace(whole, name=f"{name}-slice", depth=BLOCKS, single_depth=min(BLOCKS, whole.single_depth))
    request = ExportRequest(
        spec, RandomWeights(0), precision("fp16"), ("rtx:sm89",), out=WORK / "slice", force=True, verify=False
    )
    record = export(request, lambda line: print(line, file=sys.stderr)).engines["rtx:sm89"]
    print(json.dumps({"attentions": spec.attentions, **built(record)}))


def built(record: EngineRecord) -> dict[str, Any]:
    """What the results keep of an engine."""
    return {
        "version": record.version,
        "fused_attentions": dict(record.fused_attentions),
        "kernels": record.kernels,
        "kernels_by_call": dict(record.kernels_by_call),
        "engine_bytes": record.nbytes,
        "activation_bytes": record.activation_bytes,
        "build_seconds": sum(segment.seconds for segment in record.segments),
    }


def measure_whole() -> dict[str, Any]:
    """From one file in the original layout to an engine."""
    from checkpoint_configs import CONFIGS
    from make_checkpoint import DTYPES, make_file

    from mmdit_deploy.build import EngineRecord

    file, out = WORK / "whole.safetensors", WORK / "whole"
    file.unlink(missing_ok=True)
    make_file(CONFIGS[WHOLE], file, layout="original", prefix="model.diffusion_model.", dtype=DTYPES["bf16"])
    arguments = [file, "--bf16", "--target", "rtx:sm89", "--no-verify", "--force", "-o", out]
    job = run_job([sys.executable, "-c", EXPORT, *arguments])
    engines = json.loads((out / "manifest.json").read_text())["engines"]
    record = EngineRecord.from_json("rtx:sm89", engines["rtx:sm89"])
    fused = sum(record.fused_attentions.values())
    print(
        f"{WHOLE}, {file.stat().st_size / 1e9:.2f} GB: to the engine in {job.seconds:.0f} s, peak "
        f"{job.peak_bytes / 1e9:.1f} GB, {fused} attentions fused, {record.kernels} kernels",
        flush=True,
    )
    return {
        "name": WHOLE,
        "checkpoint_bytes": file.stat().st_size,
        "seconds": job.seconds,
        "peak_gb": job.peak_bytes / 1e9,
        **built(record),
    }


def measure(name: str) -> dict[str, Any]:
    """The graph and the slice of one model."""
    out = WORK / "graph"
    graph = run_job(
        [sys.executable, "-c", EXPORT, "--preset", name, "--bf16", "--graph-only", "--force", "--json", "-o", out]
    )
    data = json.loads(graph.output)
    functions = json.loads((out / "manifest.json").read_text())["graph"]["kinds"]
    kinds = [function for function in functions if function.endswith("Block")]
    peak = graph.peak_bytes / 1e9
    print(
        f"{name}: {data['parameters'] / 1e9:.1f} B parameters, graph {graph.seconds:.1f} s (≤ {MAX_SECONDS}), peak "
        f"{peak:.2f} GB (≤ {MAX_GB}), {len(kinds)} kinds of blocks of {len(functions)} functions",
        flush=True,
    )
    job = run_job([sys.executable, __file__, "--slice", name])
    engine = json.loads(job.output.splitlines()[-1])
    fused, activations = sum(engine["fused_attentions"].values()), engine["activation_bytes"] / 1e9
    print(
        f"  {BLOCKS} + {BLOCKS} blocks for SM89: {fused} of {engine['attentions']} attentions fused, "
        f"{engine['kernels']} kernels, {activations:.2f} GB of activations, {engine['build_seconds']:.0f} s, "
        f"peak {job.peak_bytes / 1e9:.1f} GB",
        flush=True,
    )
    return {
        "parameters": data["parameters"],
        "graph_seconds": graph.seconds,
        "graph_peak_gb": peak,
        "graph_bytes": (out / "model.onnx").stat().st_size,
        "block_kinds": kinds,
        "slice": {**engine, "peak_gb": job.peak_bytes / 1e9},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", default=NAMES, help=f"presets (default {', '.join(NAMES)})")
    p.add_argument("--whole", action="store_true", help=f"also all of {WHOLE}, from a file to an engine")
    p.add_argument("--slice", metavar="NAME", help=argparse.SUPPRESS)
    args = p.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if args.slice:
        build_slice(args.slice)
        return
    results: dict[str, Any] = {"blocks": BLOCKS, "models": {name: measure(name) for name in args.names}}
    if args.whole:
        results["whole"] = measure_whole()
    shutil.rmtree(WORK)
    write_result("families", results)


if __name__ == "__main__":
    main()
