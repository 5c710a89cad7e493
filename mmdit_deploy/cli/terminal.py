"""What all commands share: exit statuses, errors without tracebacks, JSON for machines and text for people.

Importing this takes milliseconds: `--help` of every command must not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mmdit_deploy.errors import MachineError, MMDiTError, UsageError

BUG = 70  # EX_SOFTWARE of sysexits.h
_BY_SIGNAL = 128  # a shell's way to say that a signal ended a command
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
_MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_USAGE_ERRNOS = (errno.EACCES, errno.EPERM)
_PATH_ERRNOS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class _Terminated(KeyboardInterrupt):
    """Ctrl-C, or another polite signal to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the arguments, do the work, and turn whatever happens into an exit status.

    Args:
        parser: of the command. The flags of all commands are added here, where it does not have them:
            ``--json``, ``--debug``, ``--version``.
        work: does the command's work and returns its exit status.
        argv: the arguments; those of the process by default.

    Returns:
        0 done; 1 parity out of tolerance; 2 bad input or usage; 3 this machine cannot; 70 a bug of ours;
        130 interrupted, 141 nobody reads the output any more, 143 terminated.
    """
    _add_common_flags(parser)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without "×" is no reason to fail
    try:
        args = parser.parse_args(argv)
    except SystemExit as exit_:  # --help, --version, or a usage error that argparse has told
        return exit_.code if isinstance(exit_.code, int) else 2
    with _polite_signals():
        return _status(parser, work, args)


def _status(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int], args: argparse.Namespace
) -> int:
    try:
        status = work(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `mmdit-inspect … | head`
        _discard_stdout()
        return _BY_SIGNAL + signal.SIGPIPE
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, _Terminated) else signal.SIGINT
        status = _BY_SIGNAL + number
        _print_error(args, "interrupted", kind="Interrupted", status=status)
        return status
    except Exception as error:
        known = _as_known(error)
        if known is None:
            traceback.print_exc()
            message = f"{parser.prog}: this is a bug of mmdit-deploy: please report it, with the lines above"
            _print_error(args, message, kind=type(error).__name__, status=BUG)
            return BUG
        if getattr(args, "debug", False):
            traceback.print_exc()
        status = known.exit_status
        _print_error(args, f"{parser.prog}: {known}", kind=type(known).__name__, status=status, error=known)
        return status


def emit(args: argparse.Namespace, text: str, data: dict[str, Any]) -> None:
    """Print a result: text for people, or one JSON document for machines and the text on stderr.

    Args:
        args: the command's arguments; `args.json` decides.
        text: for people.
        data: for machines; NaN and infinities become null, which is all that JSON has for them.
    """
    if not getattr(args, "json", False):
        print(text)
        return
    print(text, file=sys.stderr)
    print(json.dumps(_finite(data), indent=1, allow_nan=False))
    args.emitted = True  # one document only: an error that follows is told on stderr alone


def check_report_path(option: str, path: Path | None) -> None:
    """Refuse a path that a report cannot be written to, before the work that it is about. Nothing is made yet.

    Args:
        option: that it was given with, e.g. ``--html``.
        path: the file; None where the option was not given.

    Raises:
        UsageError: something else than a file is there, or its folder cannot be made or written to.
    """
    reason = _unwritable(path) if path is not None else None
    if reason:
        raise UsageError(
            f"{option} names a file that can be written", received=f"{path}: {reason}", fix="name another file"
        )


def _unwritable(path: Path) -> str | None:
    try:
        if os.path.lexists(path) and not stat.S_ISREG(path.stat().st_mode):
            return "a folder" if path.is_dir() else "no regular file"
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not stat.S_ISDIR(folder.stat().st_mode):
            return f"{folder} is no folder"
        for part in path.absolute().relative_to(folder).parts:
            with contextlib.suppress(FileNotFoundError):
                (folder / part).lstat()  # the folders to be made may have names that are too long
    except OSError as error:
        return error.strerror or str(error)
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written to"


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows in columns: text to the left, and columns of figures to the right, under a heading or not."""
    columns = list(zip(*rows, strict=True))
    lines = []
    for row in rows:
        cells = [
            cell.rjust(max(map(len, column))) if _is_figures(column) else cell.ljust(max(map(len, column)))
            for cell, column in zip(row, columns, strict=True)
        ]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_figures(column: Sequence[str]) -> bool:
    return all(cell[:1].isdecimal() or not cell for cell in (column[1:] or column))


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from mmdit_deploy import __version__

        print(f"mmdit-deploy {__version__}")
        parser.exit()


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    # An abbreviation in somebody's script would break, or change its meaning, with the next option.
    parser.allow_abbrev = False
    for flag, action, meaning in (
        ("--json", "store_true", "one JSON document on standard output, text on standard error"),
        ("--debug", "store_true", "show the traceback of an error"),
        ("--version", _Version, "show the version and exit"),
    ):
        with contextlib.suppress(argparse.ArgumentError):  # the command has it in words of its own
            parser.add_argument(flag, action=action, help=meaning)


def _as_known(error: Exception) -> MMDiTError | None:
    """The error as one of ours, if it is one, or is plainly about the machine or about a path."""
    if isinstance(error, MMDiTError):
        return error
    # PyTorch and ONNX Runtime tell of a failed allocation in the words of a RuntimeError.
    said = str(error).lower()
    refused = isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
    if refused or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return MachineError(
            "the work must fit in this machine's memory",
            received=next(iter(str(error).splitlines()), "") or "an allocation failed",
            fix="close other programs, use a smaller model or shape, or a machine with more memory",
        )
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        return MachineError(
            "what is written must fit on the disk, and the disk must work",
            received=str(error),
            fix="free space, or write elsewhere",
        )
    if isinstance(error, OSError) and error.errno in _USAGE_ERRNOS:
        return UsageError(
            "the paths must be ones that this user may read and write",
            received=str(error),
            fix="check the permissions, or name another path",
        )
    if isinstance(error, OSError) and error.errno in _PATH_ERRNOS:
        return UsageError(
            "a path must name a file where a file is meant, in a folder, and be of a length that the disk takes",
            received=str(error),
            fix="name another path",
        )
    return None


def _print_error(
    args: argparse.Namespace, message: str, *, kind: str, status: int, error: MMDiTError | None = None
) -> None:
    # Nobody may be listening any more; the exit status still tells.
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
        if getattr(args, "json", False) and not getattr(args, "emitted", False):
            parts = {"rule": error.rule, "received": error.received, "fix": error.fix} if error else {"rule": message}
            print(json.dumps({"error": {"type": kind, **parts}, "exit_status": status}, indent=1))
            sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _polite_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP unwind the stack once, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes handlers in the main thread only
        return

    def stop(number: int, _: FrameType | None) -> None:
        for other in replaced:
            signal.signal(other, signal.SIG_IGN)  # a second one must not break off the cleaning up
        raise _Terminated(number)

    replaced = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP on purpose, and a shell SIGINT for a job in the background; a handler that is not
        # Python's (None) could not be put back
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            replaced[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _discard_stdout() -> None:
    """Python flushes stdout once more at exit, and would complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
