"""Peak memory and time of streaming parity: a whole model compared block by block in the memory of one block.

    python bench/parity_memory.py [--depth 24] [--work DIR]

Exports `--depth N --fp16` with random weights, then verifies it against the eager fp32 model, every block on equal
inputs and on its own chain (`mmdit-verify --full --blocks-only`). Beside it, in the same run: what the whole model
takes, eager and engine in one process (`mmdit-verify --full` loads the engine whole; the eager model alone would hold
4 bytes per parameter). Peak memory is the sampled RssAnon of the process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from measure import run_job, write_result

CPU = ("--target", "ort-cpu")  # no TensorRT engine besides
COMMAND = "import sys; from mmdit_deploy.cli.{0} import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=int, default=24)
    p.add_argument("--work", type=Path, default=Path("dist/bench"))
    args = p.parse_args()
    bundle = args.work / "parity"
    export = [sys.executable, "-c", COMMAND.format("export")]
    verify = [sys.executable, "-c", COMMAND.format("verify"), bundle, "--full", "--json"]
    run_job([*export, "--depth", str(args.depth), "--fp16", *CPU, "--no-verify", "--force", "-o", bundle])
    try:
        streaming = run_job([*verify, "--blocks-only"])
        whole = run_job(verify)
    finally:
        shutil.rmtree(bundle)
    verdict = json.loads(streaming.output)
    worst = max(c["errors"]["rel_l2"] for c in verdict["checks"] if c["binding"])
    weights = (
        4 * json.loads(run_job([*export, "--depth", str(args.depth), *CPU, "--dry-run", "--json"]).output)["parameters"]
    )
    for name, job in (("streaming parity", streaming), ("with the whole engine", whole)):
        print(f"{name:24s} {job.seconds:6.0f} s   peak {job.peak_bytes / 1e9:5.2f} GB")
    print(f"{len(verdict['checks'])} comparisons, passed: {verdict['passed']}, worst binding rel-L2 {worst:.2e}")
    write_result(
        "parity_memory",
        {
            "depth": args.depth,
            "precision": "fp16",
            "streaming": {"seconds": streaming.seconds, "peak_gb": streaming.peak_bytes / 1e9},
            "whole": {"seconds": whole.seconds, "peak_gb": whole.peak_bytes / 1e9},
            "fp32_weights_gb": weights / 1e9,
            "comparisons": len(verdict["checks"]),
            "passed": verdict["passed"],
            "worst_binding_rel_l2": worst,
        },
    )


if __name__ == "__main__":
    main()
