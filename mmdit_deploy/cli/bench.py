"""`mmdit-bench`: latency of a bundle's engines against eager PyTorch and `torch.compile`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmdit_deploy.cli.terminal import check_report_path, emit, run_command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="mmdit-bench",
        description="Time a bundle's engines, interleaved with the eager model and torch.compile: median and 90th "
        "percentile, and ratios within the run.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's directory")
    p.add_argument("--engine", action="append", default=[], metavar="TARGET", help="e.g. ort-cpu; may repeat")
    p.add_argument("--batch", type=int, metavar="N", help="default: the engine's optimum")
    p.add_argument("--img-tokens", type=int, metavar="N", help="default: the engine's optimum")
    p.add_argument("--txt-tokens", type=int, metavar="N", help="default: the engine's optimum")
    p.add_argument("--rounds", type=int, default=10, metavar="N", help="calls measured per rival (default 10)")
    p.add_argument("-o", "--out", type=Path, metavar="FILE", help="also write the JSON document to a file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(parser(), _work, argv)


def _work(args: argparse.Namespace) -> int:
    from mmdit_deploy.atomic import write_whole
    from mmdit_deploy.errors import UsageError
    from mmdit_deploy.latency import bench_bundle

    for name in ("batch", "img_tokens", "txt_tokens", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} is at least 1", received=str(value), fix="give a positive number"
            )
    check_report_path("--out", args.out)
    report = bench_bundle(
        args.bundle,
        args.engine,
        batch=args.batch,
        img_tokens=args.img_tokens,
        txt_tokens=args.txt_tokens,
        rounds=args.rounds,
    )
    emit(args, report.text(), report.to_json())  # first: a disk that is full takes no report
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(report.to_json(), indent=1) + "\n")
    return 0
