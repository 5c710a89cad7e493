"""How well each precision still draws what it is asked for: the digits model, exported, sampled and judged.

    python bench/digits.py                       every precision
    python bench/digits.py fp16 fp8 --count 90   some, with fewer images

Each precision is exported by `mmdit-export` for ONNX Runtime on the CPU, and samples the same prompts from the same
noise as the eager model in fp32. Quantized ones are calibrated on inputs that were captured from diffusers' own model
while it drew other digits; with --uncaptured, on the trajectory that `mmdit-export` makes up itself, without words.

A judge that saw none of this says which digit an image shows (digits_data.py). bf16 and FP4 are emulated on the CPU.
Beside the accuracy stands how far the latent is from eager's after each step, as relative L2: a trajectory may leave
eager's and still end at a good digit.

Writes bench/results/digits.json and digits.png: a row per precision, and per digit a thin, a plain and a bold one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from digits_data import FULL, SIDE, Judge
from digits_model import (
    AT_ONCE,
    CHECKPOINT,
    GUIDANCE,
    POINTS,
    RANGES,
    SHIFT,
    STEPS,
    Score,
    capture_inputs,
    digits_accuracy,
    eager,
    engine,
    export_arguments,
    questions,
    step_errors,
)
from digits_prompts import NUMBERS, WEIGHTS
from measure import write_result
from PIL import Image, ImageDraw

from mmdit_deploy.cli.export import main as mmdit_export
from mmdit_deploy.runtime import Engine
from mmdit_deploy.spec import QUANTIZED

TARGET = "ort-cpu"
KINDS = (WEIGHTS[0], None, WEIGHTS[1])  # from left to right in the picture
PIXEL, GAP, LABEL, HEAD = 3, 2, 44, 14  # of the picture, in pixels


def score_precision(name: str, judge: Judge, count: int, folder: Path, options: Sequence[str]) -> Score:
    """Exports a precision, and scores its engine."""
    bundle = folder / name
    status = mmdit_export([*export_arguments(name, bundle), *options])
    if status:
        raise SystemExit(f"mmdit-export --{name} ended with {status}")
    with Engine.load(bundle, TARGET) as opened:
        return digits_accuracy(engine(opened), judge, count)


def compared(name: str, score: Score, reference: Score) -> dict[str, Any]:
    """What is reported of a precision."""
    lost = 100 * (reference.accuracy - score.accuracy)
    return {
        "accuracy": round(score.accuracy, 4),
        "weight_accuracy": round(score.weight_accuracy, 4),
        "points_lost": round(lost, 2),
        "points_allowed": POINTS[name],
        "within": bool(lost <= POINTS[name]),
        "rel_l2_by_step": [float(f"{error:.3g}") for error in step_errors(score.latents, reference.latents)],
    }


def draw_grid(scores: Mapping[str, Score], count: int) -> Image.Image:
    """The picture: the first image of each kind and digit, a row per precision."""
    asked = list(zip(*questions(count), strict=True))
    columns = [asked.index((digit, kind)) for digit in range(len(NUMBERS)) for kind in KINDS]
    cell = SIDE * PIXEL + GAP
    picture = Image.new("L", (LABEL + cell * len(columns) + GAP, HEAD + cell * len(scores) + GAP), 255)
    pen = ImageDraw.Draw(picture)
    for i in range(len(NUMBERS)):
        pen.text((LABEL + cell * len(KINDS) * i + cell, 1), str(i), fill=0)
    for row, (name, score) in enumerate(scores.items()):
        top = HEAD + GAP + row * cell
        pen.text((2, top + SIDE), name, fill=0)
        for column, index in enumerate(columns):
            ink = score.images[index].reshape(SIDE, SIDE)
            tile = Image.fromarray(np.uint8(255 * (1 - ink / FULL)))
            enlarged = tile.resize((SIDE * PIXEL, SIDE * PIXEL), Image.Resampling.NEAREST)
            picture.paste(enlarged, (LABEL + GAP + column * cell, top))
    return picture


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 where a precision lost more than it may."""
    parser = argparse.ArgumentParser(description="Score what each precision of the digits model draws.")
    parser.add_argument("precisions", nargs="*", metavar="PRECISION", help=f"of {', '.join(POINTS)} (default: all)")
    parser.add_argument("--count", type=int, default=300, help="images per precision (default 300)")
    parser.add_argument("--option", action="append", default=[], help="one more argument of mmdit-export; may repeat")
    parser.add_argument("--uncaptured", action="store_true", help="let mmdit-export calibrate on its own trajectory")
    args = parser.parse_args(arguments)
    precisions = args.precisions or list(POINTS)
    if not set(precisions) <= set(POINTS):
        parser.error(f"a precision is one of {', '.join(POINTS)}")
    judge = Judge()
    scores = {"eager": digits_accuracy(eager(), judge, args.count)}
    print(f"eager: accuracy {scores['eager'].accuracy:.3f}", file=sys.stderr)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = list(args.option)
        if not args.uncaptured:
            capture_inputs(folder / "captured.safetensors")
            options.append(f"--calib={folder / 'captured.safetensors'}")
        for name in precisions:
            calibrated = options if name in QUANTIZED else args.option
            scores[name] = score_precision(name, judge, args.count, folder, calibrated)
            results[name] = compared(name, scores[name], scores["eager"])
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    picture = Path(__file__).parent / "results" / "digits.png"
    draw_grid(scores, args.count).save(picture, optimize=True)
    write_result(
        "digits",
        {
            "model": json.loads((CHECKPOINT.parent / "training.json").read_text()),
            "target": TARGET,
            "options": args.option,
            "calibration": "trajectory of mmdit-export" if args.uncaptured else "captured from diffusers",
            "ranges": {axis: str(range_) for axis, range_ in RANGES.items()},
            "sampler": {"steps": STEPS, "shift": SHIFT, "guidance": GUIDANCE, "images_at_once": AT_ONCE},
            "images": args.count,
            "eager": {
                "accuracy": round(scores["eager"].accuracy, 4),
                "weight_accuracy": round(scores["eager"].weight_accuracy, 4),
            },
            "precisions": results,
        },
    )
    return 0 if all(result["within"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
