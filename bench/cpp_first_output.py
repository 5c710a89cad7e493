"""How soon the C++ runtime gives its first output, hashing apart: over bare ONNX Runtime C++ on the same graph.

    make cpp && python bench/cpp_first_output.py [--depth N] [--rounds N]

Each rival is a process of its own, from the start of main to the output of one step (`bench/cpp_first_output/`): both
read the same graph and weights, which the page cache holds, with the same session options, and give the same numbers.

- bare: an ONNX Runtime session and one run, nothing checked
- ours: `mmdit::Engine::load` with verify=never, and one run
- ours, hashed: with verify=always; what the SHA-256s took is measured by itself and taken off
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import SETTLE_SECONDS, p50_p90, write_result

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.spec import ModelSpec, precision

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "dist/cpp/bench"
SIZES = {"batch": 1, "img_tokens": 256, "txt_tokens": 77}
TARGET = 1.1


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=int, default=8, help="of a random SD3 model: 8 is 8 blocks × 512")
    p.add_argument("--rounds", type=int, default=15)
    args = p.parse_args()
    build()
    spec = ModelSpec(f"depth-{args.depth}", depth=args.depth, num_heads=args.depth)
    with tempfile.TemporaryDirectory(dir=ROOT / "dist") as folder:
        bundle = Path(folder) / "bundle"
        export(ExportRequest(spec, RandomWeights(0), precision("fp32"), out=bundle, targets=("ort-cpu",), verify=False))
        nbytes = (bundle / "weights.safetensors").stat().st_size
        measured = interleaved(bundle, args.rounds)
    first = {name: [run["first_output"] - run["hashing"] for run in runs] for name, runs in measured.items()}
    figures = {name: p50_p90(seconds) for name, seconds in first.items()}
    bare = figures["bare"][0]
    ratios = {name: p50 / bare for name, (p50, _) in figures.items()}
    for name, (p50, p90) in figures.items():
        print(f"{name:14s} p50 {p50 * 1e3:7.1f} ms  p90 {p90 * 1e3:7.1f} ms   × {ratios[name]:.3f} (target: {TARGET})")
    hashing = p50_p90([run["hashing"] for run in measured["ours, hashed"]])[0]
    print(f"hashing {nbytes / 1e9:.2f} GB took {hashing * 1e3:.0f} ms, {nbytes / hashing / 1e9:.2f} GB/s")
    write_result(
        "cpp_first_output",
        {
            "spec": spec.to_json(),
            "sizes": SIZES,
            "weights_bytes": nbytes,
            "rounds": args.rounds,
            "first_output_p50_p90_s": figures,
            "loaded_p50_p90_s": {name: p50_p90([run["loaded"] for run in runs]) for name, runs in measured.items()},
            "hashing_s": hashing,
            "ratio_to_bare": ratios,
            "target": TARGET,
        },
    )


def build() -> None:
    """Build both programs, with what `make cpp` found."""
    cache = (ROOT / "dist/cpp/release/CMakeCache.txt").read_text().splitlines()
    wanted = ("ONNXRUNTIME_INCLUDE_DIR:", "ONNXRUNTIME_LIBRARY:", "nlohmann_json_DIR:")
    found = [f"-D{line}" for line in cache if line.startswith(wanted)]
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DMMDIT_TENSORRT=OFF", *found]
    for command in (
        ["cmake", "-S", ROOT / "bench/cpp_first_output", "-B", BUILD, *options],
        ["cmake", "--build", BUILD],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def interleaved(bundle: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each rival reported, one after the other in every round."""
    sizes = [str(size) for size in SIZES.values()]
    rivals = {
        "bare": [BUILD / "bare", bundle / "model.ort.onnx", *sizes],
        "ours": [BUILD / "ours", bundle, *sizes, "never"],
        "ours, hashed": [BUILD / "ours", bundle, *sizes, "always"],
    }
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for index in range(rounds + 1):
        for name, command in rivals.items():
            time.sleep(SETTLE_SECONDS)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            if index:  # the first round fills the page cache
                measured[name].append(json.loads(done.stdout))
    sums = {run["sum"] for runs in measured.values() for run in runs}
    if len(sums) != 1:
        raise SystemExit(f"the rivals do not compute the same: {sums}")
    return measured


if __name__ == "__main__":
    main()
