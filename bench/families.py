"""Every family at real size: the graph of the whole model, and a slice of it built by TensorRT-RTX.

    python bench/families.py                  the three largest
    python bench/families.py flux2-klein-4b   others, by the names of their presets

The graph is `mmdit-export --preset NAME --bf16 --graph-only`: time and peak memory of the process, start and imports
included, and the kinds of blocks that were traced. The slice has real width, two joint blocks and, where the family has
any, two single ones, with random weights: TensorRT-RTX builds it for SM89 in fp16, and the fusion gate reads from the
engine's own list of kernels that every attention and norm is fused. Nothing is executed. A single run each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_job, write_result

WORK = Path(__file__).resolve().parents[1] / "dist" / "bench" / "families"
NAMES = ("flux1-dev", "qwen-image", "flux2-dev")
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
    print(
        json.dumps(
            {
                "version": record.version,
                "attentions": spec.attentions,
                "fused_attentions": dict(record.fused_attentions),
                "kernels": record.kernels,
                "kernels_by_call": dict(record.segments[0].kernels_by_call),
                "engine_bytes": record.nbytes,
                "activation_bytes": record.activation_bytes,
                "build_seconds": record.segments[0].seconds,
            }
        )
    )


def measure(name: str) -> dict[str, Any]:
    """The graph and the slice of one model."""
    export = "import sys; from mmdit_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
    out = WORK / "graph"
    graph = run_job(
        [sys.executable, "-c", export, "--preset", name, "--bf16", "--graph-only", "--force", "--json", "-o", out]
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
    built = run_job([sys.executable, __file__, "--slice", name])
    engine = json.loads(built.output.splitlines()[-1])
    print(
        f"  {BLOCKS} + {BLOCKS} blocks for SM89: {sum(engine['fused_attentions'].values())} of {engine['attentions']} "
        f"attentions fused, {engine['kernels']} kernels, {engine['activation_bytes'] / 1e9:.2f} GB of activations, {engine['build_seconds']:.0f} s, "
        f"peak {built.peak_bytes / 1e9:.1f} GB",
        flush=True,
    )
    return {
        "parameters": data["parameters"],
        "graph_seconds": graph.seconds,
        "graph_peak_gb": peak,
        "graph_bytes": (out / "model.onnx").stat().st_size,
        "block_kinds": kinds,
        "slice": {**engine, "peak_gb": built.peak_bytes / 1e9},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", default=NAMES, help=f"presets (default {', '.join(NAMES)})")
    p.add_argument("--slice", metavar="NAME", help=argparse.SUPPRESS)
    args = p.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if args.slice:
        build_slice(args.slice)
        return
    results = {name: measure(name) for name in args.names}
    shutil.rmtree(WORK)
    write_result("families", {"blocks": BLOCKS, "models": results})


if __name__ == "__main__":
    main()
