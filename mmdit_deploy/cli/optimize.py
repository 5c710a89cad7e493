"""`mmdit-optimize IN.onnx OUT.onnx`: fuse any ONNX graph, and lower it to a runtime's dialect."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from mmdit_deploy.cli.terminal import emit, run_command, table

if TYPE_CHECKING:
    from mmdit_deploy.graph.optimize import Optimized


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        "mmdit-optimize",
        description="Fuse the graph of an ONNX model, and lower it to a runtime's dialect. Weights beside "
        "the file stay where they are, and are not loaded.",
    )
    parser.add_argument("source", metavar="IN.onnx", help="the model")
    parser.add_argument(
        "target", metavar="OUT.onnx", help="the file to write; in the folder of IN if that has weights there"
    )
    parser.add_argument(
        "--dialect",
        choices=("standard", "ort"),
        default="standard",
        help="standard: ONNX's own ops (default); ort: what ONNX Runtime runs fastest on CPU",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there; it may be IN")
    return run_command(parser, _work, argv)


def _work(args: argparse.Namespace) -> int:
    from mmdit_deploy.graph.optimize import optimize_file

    done = optimize_file(args.source, args.target, args.dialect, force=args.force)
    emit(args, _text(args, done), {"source": args.source, "target": args.target, **dataclasses.asdict(done)})
    return 0


def _text(args: argparse.Namespace, done: Optimized) -> str:
    passes = [("pass", "fired"), *((step.name, str(step.count)) for step in done.passes)]
    ops = [("op", "before", "after"), *((op, str(n), str(done.after[op])) for op, n in done.before.items())]
    return f"{args.source} ⇒ {args.target} ({done.dialect})\n\n{table(passes)}\n\n{table(ops)}"


if __name__ == "__main__":
    sys.exit(main())
