"""Whatever a command's work does, the caller gets the right exit status and words, and no traceback but for bugs."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdit_deploy.cli.terminal import check_report_path, emit, run_command, table
from mmdit_deploy.errors import MachineError, ParityError, UsageError

ROOT = Path(__file__).parents[2]
COMMANDS = ("export", "optimize", "verify", "bench", "inspect")


def run(work: Callable[[argparse.Namespace], int], *argv: str) -> int:
    return run_command(argparse.ArgumentParser("mmdit-test"), work, list(argv))


def failing(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def work(_: argparse.Namespace) -> int:
        raise error

    return work


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from mmdit_deploy.cli.{command} import main; assert main(['--help']) == 0\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'numpy', 'onnxruntime', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"mmdit-{command}" in done.stdout


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("the rule", received="this", fix="do that"), 2),
        (MachineError("the rule"), 3),
        (ParityError("the rule"), 1),
        (MemoryError(), 3),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 3),
        (OSError(errno.ENOSPC, "No space left on device", "weights.safetensors"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 2),
        (FileExistsError(errno.EEXIST, "File exists", "file"), 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "loop"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_expected_errors_have_a_status_and_no_traceback(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(error)) == status
    out, err = capsys.readouterr()
    assert out == "" and err and "Traceback" not in err
    if isinstance(error, UsageError):
        assert err == "mmdit-test: the rule\n  received: this\n  fix:      do that\n"
    if isinstance(error, KeyboardInterrupt):
        assert err == "interrupted\n"
    if isinstance(error, OSError):
        assert "received:" in err and str(error) in err and "fix:" in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(UsageError("the rule")), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_asks_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(ZeroDivisionError("oops"))) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "oops" in err and "report" in err


def test_usage_errors_of_the_parser_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: 0, "--unknown") == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    assert run(lambda _: 0, "--js") == 2  # no abbreviations: the next option would change what they mean


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: 0, "--version") == 0
    assert capsys.readouterr().out.startswith("mmdit-deploy ")


def test_a_command_may_have_its_own_json_flag() -> None:
    parser = argparse.ArgumentParser("mmdit-test")
    parser.add_argument("--json", action="store_true", help="in words of its own")
    assert run_command(parser, lambda args: 0 if args.json else 9, ["--json"]) == 0


def test_emit_puts_text_or_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def work(args: argparse.Namespace) -> int:
        emit(args, "2 × 3", {"six": 6, "worst": [math.nan, math.inf, 1.5]})
        return 0

    assert run(work) == 0
    assert capsys.readouterr() == ("2 × 3\n", "")
    assert run(work, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"six": 6, "worst": [None, None, 1.5]} and err == "2 × 3\n"


def test_errors_are_one_json_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(UsageError("the rule", received="this", fix="do that")), "--json") == 2
    out, err = capsys.readouterr()
    error = {"type": "UsageError", "rule": "the rule", "received": "this", "fix": "do that"}
    assert json.loads(out) == {"error": error, "exit_status": 2} and "the rule" in err

    def emits_then_fails(args: argparse.Namespace) -> int:
        emit(args, "", {"verdict": "FAIL"})
        raise ParityError("the rule")

    assert run(emits_then_fails, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"verdict": "FAIL"}


def start(work: str, **options: object) -> subprocess.Popen[str]:
    code = (
        "import argparse, os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from mmdit_deploy.cli.terminal import run_command\n"
        # a shell, or nohup, may start us with them ignored
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_DFL)\n"
        f"def work(args):\n{work}\n"
        "sys.exit(run_command(argparse.ArgumentParser('mmdit-test'), work, []))"
    )
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_unwind_the_stack(number: signal.Signals, status: int, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    work = (
        f"    partial = Path({str(partial)!r})\n"
        "    try:\n        partial.touch()\n        time.sleep(60)\n    finally:\n        partial.unlink()\n"
    )
    process = start(work)
    deadline = time.monotonic() + 30
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err == "interrupted\n" and not partial.exists()


def test_a_second_ctrl_c_does_not_break_off_the_cleaning_up(tmp_path: Path) -> None:
    partial, cleaning = tmp_path / "partial", tmp_path / "cleaning"
    work = (
        f"    partial, cleaning = Path({str(partial)!r}), Path({str(cleaning)!r})\n"
        "    try:\n        partial.touch()\n        time.sleep(60)\n"
        "    finally:\n        cleaning.touch()\n        time.sleep(0.5)\n        partial.unlink()\n"
    )
    process = start(work)
    deadline = time.monotonic() + 30
    for sign in (partial, cleaning):
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "interrupted\n" and not partial.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "a folder"),
        ("file/x.html", "is no folder"),
        ("file/a/b/x.html", "is no folder"),
        ("loop/x.html", "symbolic links"),
        ("nowhere/x.html", "No such file"),
        ("fifo", "no regular file"),
        ("x" * 300, "too long"),
        ("new/" + "x" * 300 + "/x.html", "too long"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match="--html names a file") as caught:
        check_report_path("--html", tmp_path / name)
    assert reason in str(caught.value.received)
    for good in ("x.html", "file", "new/er/x.html", "folder/x.html"):
        check_report_path("--html", tmp_path / good)
    assert sorted(tmp_path.iterdir()) == before


def test_a_report_in_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written to"):
        check_report_path("--out", tmp_path / "new" / "x.json")


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("    time.sleep(0.2)\n    print('x' * 100_000)\n    return 0\n")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141 and err == ""


def test_a_terminal_that_knows_ascii_only_is_enough() -> None:
    process = start("    print('2 × 3')\n    return 0\n", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "2 \\xd7 3\n" and err == ""


def test_table_aligns_figures_to_the_right() -> None:
    assert table([("pass", "fired"), ("linear", "16"), ("attention", "2")]) == (
        "  pass       fired\n  linear        16\n  attention      2"
    )
