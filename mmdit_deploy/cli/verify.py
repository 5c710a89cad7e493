"""`mmdit-verify`: does a bundle's engine compute the model?"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmdit_deploy.cli.terminal import check_report_path, emit, run_command
from mmdit_deploy.errors import MachineError, UsageError

if TYPE_CHECKING:
    from mmdit_deploy.verify.sampling import Sampler


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="mmdit-verify",
        description="Compare a bundle's engine with the eager fp32 model: with what was recorded at export, or, "
        "given the checkpoint, block by block. Exit status 1 means out of tolerance, 3 that the engine did not run.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's directory")
    p.add_argument("--engine", metavar="TARGET", help="e.g. ort-cpu (default: what this machine can run)")
    p.add_argument("--checkpoint", metavar="PATH", help="the checkpoint it was made from: compare every block")
    p.add_argument(
        "--lora",
        action="append",
        metavar="FILE",
        help="a LoRA that it was made with, where it was moved since (with --checkpoint or --full); may repeat",
    )
    p.add_argument(
        "--full",
        action="store_true",
        help="compare every block of a bundle with random weights, made again from its seed",
    )
    p.add_argument("--thorough", action="store_true", help="more and larger shapes (with --checkpoint or --full)")
    p.add_argument(
        "--blocks-only", action="store_true", help="do not run the whole engine: one block's memory is enough"
    )
    p.add_argument(
        "--bisect",
        action="store_true",
        help="find the first block, and the first node in it, that is out of tolerance, in one block's memory",
    )
    p.add_argument(
        "--trajectory",
        metavar="STEPS",
        help="also sample from the same noise with both, and compare every step and the image at the end (with "
        "--checkpoint or --full)",
    )
    p.add_argument("--guidance", metavar="SCALE", help="classifier-free guidance of the trajectory (default: none)")
    p.add_argument("--decode", metavar="MODULE:FUNCTION", help="makes images of the trajectory's latents")
    p.add_argument(
        "--noise-floor",
        metavar="HOW",
        help="what errors are compared with: the eager model in the engine's own type on some cases (auto, the "
        "default) or on all (dtype), torch.compile too (compile), or none (with --checkpoint or --full)",
    )
    p.add_argument("--tolerances", type=Path, metavar="FILE", help="your own bounds, as TOML")
    p.add_argument("--junit", type=Path, metavar="FILE", help="write a JUnit report")
    p.add_argument("--html", type=Path, metavar="FILE", help="write an HTML report")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(parser(), _work, argv)


def _work(args: argparse.Namespace) -> int:
    if args.bisect:
        return _bisect(args)
    from mmdit_deploy.report import verdict_text, write_html, write_junit
    from mmdit_deploy.verification import verify_bundle

    check_report_path("--junit", args.junit)
    check_report_path("--html", args.html)
    verdict = verify_bundle(
        args.bundle,
        target=args.engine or "auto",
        checkpoint=args.checkpoint,
        loras=args.lora or (),
        full=args.full,
        thorough=args.thorough,
        whole=not args.blocks_only,
        noise_floor=args.noise_floor,
        tolerances=args.tolerances,
        sampler=_sampler(args),
        decode=args.decode,
        progress=_progress,
    )
    emit(args, verdict_text(verdict), verdict.to_json())  # first: a disk that is full takes no report
    if args.junit:
        write_junit([verdict], args.junit)
    if args.html:
        write_html(
            [verdict],
            args.html,
            title=f"{verdict.bundle} on {verdict.target}",
            facts={"weights": verdict.weights},
        )
    if not verdict.passed:
        return 1
    return 0 if verdict.engine_executed else MachineError.exit_status


def _progress(name: str, index: int, count: int) -> None:
    print(f"verify: {name} ({index + 1} of {count})", file=sys.stderr, flush=True)


def _bisect(args: argparse.Namespace) -> int:
    """Look for the first fault; exit status 1 where there is one."""
    others = {
        "--trajectory": args.trajectory,
        "--noise-floor": args.noise_floor,
        "--tolerances": args.tolerances,
        "--junit": args.junit,
        "--html": args.html,
        "--thorough": args.thorough,
        "--guidance": args.guidance,
        "--decode": args.decode,
        "--blocks-only": args.blocks_only,
    }
    for option, value in others.items():
        if value:
            raise UsageError(
                "--bisect looks for the first fault, and for nothing else",
                received=f"--bisect and {option}",
                fix=f"drop {option}",
            )
    from mmdit_deploy.bisection import bisect_bundle

    found = bisect_bundle(
        args.bundle,
        target=args.engine or "auto",
        checkpoint=args.checkpoint,
        loras=args.lora or (),
        full=args.full,
        progress=_progress,
    )
    emit(args, found.text(), found.to_json())
    return 0 if found.found is None else 1


def _sampler(args: argparse.Namespace) -> Sampler | None:
    """How a trajectory is sampled, where one was asked for."""
    from mmdit_deploy.cli.model_choice import whole_number
    from mmdit_deploy.verify.sampling import Sampler

    if args.trajectory is None:
        if args.guidance is not None:
            raise UsageError("--guidance is of a trajectory", received="--guidance alone", fix="--trajectory 20")
        return None
    steps = whole_number("--trajectory", args.trajectory, "a number of steps")
    return Sampler(steps, guidance=None if args.guidance is None else _scale(args.guidance))


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 100:
        raise UsageError("--guidance is a number from 0 to 100", received=ascii(text)[:40], fix="--guidance 5")
    return scale
