"""`mmdit-verify`: does a bundle's engine compute the model?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmdit_deploy.cli.terminal import check_report_path, emit, run_command
from mmdit_deploy.errors import MachineError


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
    p.add_argument("--junit", type=Path, metavar="FILE", help="write a JUnit report")
    p.add_argument("--html", type=Path, metavar="FILE", help="write an HTML report")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(parser(), _work, argv)


def _work(args: argparse.Namespace) -> int:
    from mmdit_deploy.report import verdict_text, write_html, write_junit
    from mmdit_deploy.verification import verify_bundle

    def progress(name: str, index: int, count: int) -> None:
        print(f"verify: {name} ({index + 1} of {count})", file=sys.stderr, flush=True)

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
        progress=progress,
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
