"""`mmdit-optimize IN.onnx OUT.onnx`: fuse any ONNX graph, and lower it to a runtime's dialect."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from mmdit_deploy.cli.terminal import emit, run_command
from mmdit_deploy.graph.dialects import STANDARD, USER_DIALECTS


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        "mmdit-optimize",
        description="Fuse the graph of an ONNX model, and lower it to a runtime's dialect. Weights beside "
        "the file stay where they are, and are not loaded.",
    )
    p.add_argument("source", metavar="IN.onnx", help="the model")
    p.add_argument(
        "target", metavar="OUT.onnx", help="the file to write; in the folder of IN if that has weights there"
    )
    meanings = "; ".join(f"{name}: {dialect.meaning}" for name, dialect in USER_DIALECTS.items())
    p.add_argument(
        "--dialect", choices=tuple(USER_DIALECTS), default=STANDARD, help=f"{meanings} (default: {STANDARD})"
    )
    p.add_argument("--explain", action="store_true", help="list what was found and left as it was, with the reason")
    p.add_argument("--force", action="store_true", help="replace OUT if it is there; it may be IN")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status.
    """
    return run_command(parser(), _work, argv)


def _work(args: argparse.Namespace) -> int:
    from mmdit_deploy.cli.optimize_text import text_of
    from mmdit_deploy.graph.optimize import optimize_file

    done = optimize_file(args.source, args.target, args.dialect, force=args.force)
    emit(args, text_of(done, explain=args.explain), {"target": args.target, **dataclasses.asdict(done)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
