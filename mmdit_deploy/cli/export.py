"""`mmdit-export`: from a checkpoint, a preset or a depth to a verified bundle."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_deploy.cli.terminal import emit, run_command
from mmdit_deploy.errors import UsageError

if TYPE_CHECKING:
    from mmdit_deploy.export import ExportRequest, ExportResult
    from mmdit_deploy.precision.recipe import QuantizationRecipe
    from mmdit_deploy.recipes import Recipe
    from mmdit_deploy.spec import Precision

PRECISIONS = {
    "fp32": "compute in fp32",
    "fp16": "compute in fp16 (the default)",
    "bf16": "compute in bf16",
    "fp8": "attention projections, MLPs and attention in FP8 (E4M3), the rest in the base type",
    "int8": "attention projections and MLPs in INT8 (SmoothQuant), the rest in the base type",
    "fp4": "attention projections and MLPs in NVFP4, the rest in the base type",
    "w4a16": "weights of attention projections and MLPs in INT4, everything is computed in the base type",
}
BASES = ("fp16", "bf16")  # of what is not quantized
AXES = ("batch", "img_tokens", "txt_tokens")
EPILOG = """examples:
  mmdit-export --depth 24 --fp16
  mmdit-export path/to/checkpoint --bf16 --target rtx:sm89+sm120
  mmdit-export path/to/checkpoint --fp8 --calib captured.safetensors --quantize modulation=fp8-weights
  mmdit-export --preset sd3.5-large --fp16 --target rtx:sm120 --segments 4 --profile batch=2,img_tokens=4096
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="mmdit-export",
        description="Export an MMDiT (Stable Diffusion 3 and 3.5, FLUX.1, FLUX.2, Qwen-Image) to a bundle: ONNX "
        "graphs, weights, engines, and the proof that they compute the PyTorch model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="a diffusers folder, or a .safetensors file in diffusers' or the authors' own layout; without it, weights "
        "are random",
    )
    model = p.add_mutually_exclusive_group()
    model.add_argument("--preset", metavar="NAME", help="architecture by name: sd3.5-large, flux1-dev, qwen-image, …")
    model.add_argument("--depth", metavar="N", help="the SD3 paper's scaling: width 64·N, N heads, N blocks (1 to 128)")
    model.add_argument("--recipe", metavar="NAME|FILE", help="what to export as data: a shipped recipe or a TOML file")
    p.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="a LoRA (.safetensors, or a PEFT folder) to merge into the weights, SCALE times (default 1); may repeat",
    )
    p.add_argument(
        "--controlnet",
        metavar="N",
        help="take the N residuals of a ControlNet as one more input (Stable Diffusion 3 and 3.5)",
    )
    precision = p.add_mutually_exclusive_group()
    for name, help_text in PRECISIONS.items():
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=help_text)
    _add_precision_options(p)
    p.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="engine to build, repeatable: ort-cpu, ort-cuda, rtx:sm89 (TensorRT-RTX; rtx:sm86+sm89 for both), "
        "trt (TensorRT, for this machine's GPU). Default: ort-cpu and rtx:sm89; with a GPU, ort-cuda and what fits it",
    )
    p.add_argument("--batch", metavar="MIN:OPT:MAX", help="range of the batch axis (default 1:2:4)")
    p.add_argument("--img-tokens", metavar="MIN:OPT:MAX", help="range of image tokens (default 256:4096:16384)")
    p.add_argument("--txt-tokens", metavar="MIN:OPT:MAX", help="range of text tokens (default 2:333:512)")
    p.add_argument(
        "--profile",
        action="append",
        metavar="AXIS=MIN:OPT:MAX,…",
        help="a TensorRT optimization profile, e.g. batch=2,img_tokens=4096; may repeat (default: one, of the ranges)",
    )
    p.add_argument(
        "--segments",
        default="auto",
        metavar="N|auto",
        help="cut the model into N TensorRT engines, built in the memory of one (default: as few as fit into memory)",
    )
    p.add_argument(
        "--split-conditioning",
        action="store_true",
        help="two graphs and engines: one makes the modulation of a whole schedule of timesteps in one call, the other "
        "runs a step without those weights",
    )
    p.add_argument(
        "--outputs",
        action="append",
        metavar="NAME",
        help="also return a block's tokens, e.g. blocks.12 or single_blocks.3; may repeat",
    )
    p.add_argument("-o", "--out", type=Path, metavar="DIR", help="the bundle (default dist/<name>-<precision>)")
    p.add_argument("--force", action="store_true", help="replace an existing bundle, whole")
    p.add_argument("--seed", type=int, metavar="N", help="seed of random weights (default 0)")
    p.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with the eager model")
    p.add_argument("--thorough", action="store_true", help="verify more and larger shapes")
    stop = p.add_mutually_exclusive_group()
    stop.add_argument("--dry-run", action="store_true", help="stop at the preflight: check everything, write nothing")
    stop.add_argument("--graph-only", action="store_true", help="stop at the graph: write no weights")
    return p


def _add_precision_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base", metavar="fp16|bf16", help="of a quantized model: the type of the rest (default fp16)")
    p.add_argument(
        "--fp16-plan",
        choices=("auto", "pure"),
        help="with fp16: keep in fp32 what calibration says must be (auto, the default with a checkpoint), or nothing "
        "(pure, the default with random weights, which say nothing about ranges)",
    )
    p.add_argument(
        "--quantize",
        action="append",
        metavar="ROLE=SCHEME",
        help="of a quantized model: how a role's linear layers are quantized, e.g. modulation=fp8-weights or "
        "attention=none; may repeat. Roles: attention, mlp, modulation, embedders, final. Also fp8_attention=false",
    )
    p.add_argument(
        "--calib",
        type=Path,
        metavar="FILE",
        help="calibrate on inputs captured from your own pipeline (mmdit_deploy.calibration.captured); default: "
        "denoising trajectories of the eager model",
    )
    p.add_argument("--calib-method", metavar="amax|percentile|mse", help="how scales follow from what was seen")
    p.add_argument("--scales", type=Path, metavar="FILE", help="reuse a bundle's calibration.safetensors")
    p.add_argument(
        "--budget",
        metavar="rel_l2=X",
        help="of a quantized model: quantize as much as keeps the relative L2 error of the output within X",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(parser(), _work, argv)


def _work(args: argparse.Namespace) -> int:
    request = _request(args)
    from mmdit_deploy.export import export, preflight

    plan = preflight(request)
    for lora in request.loras:
        for note in lora.notes:
            _log(note)
    data: dict[str, Any] = {
        **plan.to_json(),
        "weights": request.weights.description,
        "bundle": str(request.directory),
        "spec": request.spec.to_json(),
    }
    summary = f"{request.spec.name} {request.precision.label}, weights {request.weights.description}: {plan.text()}"
    if args.dry_run:
        emit(args, f"{summary}\ndry run: nothing was written", {"dry_run": True, **data})
        return 0
    _log(summary)
    result = export(request, _log, plan)
    data |= {
        "dry_run": False,
        "seconds": dict(result.graphs.seconds),
        "census": dict(result.graphs.census),
        "engines": {name: record.to_json() for name, record in result.engines.items()},
        "conditioning_engines": {name: record.to_json() for name, record in result.conditioning.items()},
        "verdicts": [verdict.to_json() for verdict in result.verdicts],
    }
    emit(args, f"{result.path}: bundle written, {_outcome(result)}", data)
    return 0


def _outcome(result: ExportResult) -> str:
    """What is proven of the bundle, target by target."""
    executed = [verdict.target for verdict in result.verdicts if verdict.engine_executed]
    built = [name for name in result.engines if name not in executed]
    parts = [f"{', '.join(executed)} verified"] if executed else []
    if built:
        graph = "model.onnx verified" if result.verdicts else "NOT verified"
        parts.append(f"{', '.join(built)} built, not executed ({graph})")
    return "; ".join(parts) or "NOT verified"


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _request(args: argparse.Namespace) -> ExportRequest:
    from mmdit_deploy.cli.model_choice import choose_model
    from mmdit_deploy.contract import Range, parse_profile
    from mmdit_deploy.export import ExportRequest, default_targets
    from mmdit_deploy.lora import open_lora, parse_lora
    from mmdit_deploy.recipes import load_recipe
    from mmdit_deploy.spec import precision

    if args.thorough and (args.graph_only or not args.verify):
        raise UsageError(
            "--thorough says what to verify",
            received="--thorough with " + ("--graph-only" if args.graph_only else "--no-verify"),
            fix="drop one of them",
        )
    recipe = load_recipe(args.recipe) if args.recipe else None
    loras = [parse_lora(text) for text in args.lora or ()]
    spec, source, notes = choose_model(args, recipe)
    for note in notes:
        _log(note)
    compute = precision(*_precision(args, recipe))
    ranges = dict(recipe.ranges) if recipe else {}
    ranges.update({axis: Range.parse(axis, text) for axis in AXES if (text := getattr(args, axis)) is not None})
    return ExportRequest(
        spec=spec,
        source=source,
        loras=tuple(open_lora(path, spec, scale) for path, scale in loras),
        precision=compute,
        targets=tuple(args.target or (recipe and recipe.targets) or default_targets(compute)),
        out=args.out,
        ranges=ranges,
        profiles=tuple(map(parse_profile, args.profile or ())) or (recipe.profiles if recipe else ()),
        segments=_segments(args.segments),
        outputs=tuple(args.outputs or ()),
        recipe=args.recipe,
        force=args.force,
        verify=args.verify,
        thorough=args.thorough,
        graph_only=args.graph_only,
        quantization=_quantization(args, recipe, compute),
        fp16_plan=args.fp16_plan,
        calib=args.calib,
        scales=args.scales,
        budget=_budget(args.budget),
        split_conditioning=args.split_conditioning or (recipe is not None and recipe.split_conditioning),
    )


def _precision(args: argparse.Namespace, recipe: Recipe | None) -> tuple[str, str | None]:
    """The precision's name and its base: the arguments', else the recipe's."""
    name = args.precision or (recipe.precision if recipe else "fp16")
    if args.base is not None or recipe is None or name in (*BASES, "fp32"):
        return name, args.base
    return name, recipe.base or (recipe.precision if recipe.precision in BASES else None)


def _quantization(args: argparse.Namespace, recipe: Recipe | None, compute: Precision) -> QuantizationRecipe | None:
    """What is quantized: the recipe's table, if it is of this precision, with what the arguments change."""
    from mmdit_deploy.precision import ROLES
    from mmdit_deploy.precision.recipe import QuantizationRecipe

    table = dict(recipe.quantization) if recipe and recipe.precision == compute.name else {}
    for text in args.quantize or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(
                "--quantize is a role and its scheme", received=ascii(text)[:80], fix="e.g. --quantize mlp=fp8"
            )
        table[key] = value if key in ROLES else _plain(value)
    if args.calib_method is not None:
        table["method"] = args.calib_method
    return QuantizationRecipe.parse(table, compute.name) if table else None


def _plain(text: str) -> bool | float | str:
    """A value of the command line, as a recipe would have it: true, 0.8, or a word."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _budget(text: str | None) -> float | None:
    from mmdit_deploy.calibration.budget import parse_budget

    return None if text is None else parse_budget(text)


def _segments(text: str) -> int | None:
    from mmdit_deploy.cli.model_choice import whole_number

    return None if text == "auto" else whole_number("--segments", text, "a whole number or auto")
