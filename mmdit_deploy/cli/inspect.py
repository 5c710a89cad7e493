"""`mmdit-inspect PATH`: what is in a bundle, an engine, a checkpoint, an ONNX file or a safetensors file."""

from __future__ import annotations

import argparse
import sys

from mmdit_deploy.cli.terminal import emit, run_command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="mmdit-inspect",
        description="Say what is in a bundle (every byte is checked), a TensorRT engine of one, a checkpoint (a "
        "diffusers folder, or one .safetensors file in any layout), an .onnx file or any .safetensors file. "
        "No weight is loaded, and no engine is deserialized.",
    )
    p.add_argument("path", metavar="BUNDLE|ENGINE|CHECKPOINT|FILE", help="the folder or file")
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
    from mmdit_deploy.cli.describe import describe
    from mmdit_deploy.cli.inspect_text import text_of

    data = describe(args.path)
    emit(args, text_of(data), data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
