"""A function of ours in a process of its own: whatever a file does to the libraries that read it, the caller survives.

    caller ── request (one line of JSON) ─► child
    caller ◄─ answer: a result, or an error ── child, or nothing where it crashed

A fresh interpreter, not a fork: the caller may have threads, and torch with a GPU. The child ends with its caller.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing.spawn import get_executable
from typing import Any

from mmdit_deploy import errors
from mmdit_deploy.errors import MachineError, MMDiTError, UsageError

# -P: what lies in the working directory is nobody's module.
_START = "import json, sys; request = json.loads(sys.stdin.readline()); sys.path[:] = request['path']; "
_START += "from mmdit_deploy.graph.child import main; main(request)"
_KILLED_FIRST = "1000"  # the score of the process to end where memory does
_ALLOCATION_FAILED = ("bad_alloc", "MemoryError", "cannot allocate memory")


class ChildError(RuntimeError):
    """The child failed in a way that is a bug of ours: its traceback is the message."""


def in_child(function: str, request: dict[str, Any]) -> Any:
    """Call a function in a process of its own.

    Args:
        function: its module and name, ``mmdit_deploy.graph.surgery:work``; it takes the request and gives JSON values.
        request: JSON values.

    Returns:
        What it gave.

    Raises:
        UsageError: the process crashed, or what it read is nested too deep.
        MachineError: it was ended for want of memory.
        MMDiTError, OSError, MemoryError: as the function raised them.
        ChildError: it raised something else.
    """
    line = json.dumps({"function": function, "request": request, "path": sys.path}) + "\n"
    with tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C is for the caller, which then ends the child.
        process = subprocess.Popen(
            [os.fsdecode(get_executable()), "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            try:
                process.stdin.write(line.encode())
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it ended before it read anything; its status says why
            answer = process.stdout.read()  # the pipe to it stays open: that it closes is how it learns that we ended
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            _close(process.stdin)
        said.seek(0)
        return _result(answer, status, said.read()[-10_000:].decode(errors="replace"))


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        pass  # what it never read


def main(request: dict[str, Any]) -> None:
    """The child's side: do what the request says, and answer on standard output.

    Args:
        request: as `in_child` wrote it.
    """
    channel = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=_end_with_caller, daemon=True).start()
    _let_it_be_killed_first()
    answer = json.dumps(_answer(request["function"], request["request"])).encode()
    with os.fdopen(channel, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)  # whatever libraries would do at exit, and might fail at


def call(function: str, request: dict[str, Any]) -> Any:
    """Call a function by its module and name, in this process."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(request)


def _answer(function: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": call(function, request)}
    except BaseException as error:
        return {"error": _described(error), "traceback": traceback.format_exc()}


def _described(error: BaseException) -> dict[str, Any]:
    if _is_too_deep(error):
        return {
            "class": "UsageError",
            "rule": "an ONNX graph must not be nested without measure",
            "received": "one that Python's stack does not hold",
            "fix": "export it again, without functions or branches within each other",
        }
    if isinstance(error, MMDiTError):
        known = {"class": type(error).__name__, "rule": error.rule, "received": error.received, "fix": error.fix}
        return known if known["class"] in _PLAIN_ERRORS else {**known, "class": "MachineError"}
    if isinstance(error, OSError) and error.errno is not None:
        return {"class": "OSError", "arguments": [error.errno, error.strerror, _text(error.filename)]}
    if isinstance(error, MemoryError):
        return {"class": "MemoryError", "arguments": [str(error)]}
    return {"class": "ChildError"}


# Those that are made of rule, received and fix, and of nothing else.
_PLAIN_ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, MMDiTError) and "__init__" not in vars(value)
}


def _is_too_deep(error: BaseException | None) -> bool:
    seen = 0
    while error is not None and seen < 100:
        if isinstance(error, RecursionError):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _text(path: object) -> str | None:
    return None if path is None else os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)


def _result(answer: bytes, status: int, said: str) -> Any:
    if not answer:
        raise _ended(status, said)
    content = json.loads(answer)
    if "result" in content:
        return content["result"]
    error = _rebuilt(content["error"], content["traceback"])
    error.add_note(content["traceback"])  # --debug shows it
    raise error


def _rebuilt(error: dict[str, Any], trace: str) -> Exception:
    kind = error["class"]
    if kind in _PLAIN_ERRORS:
        known: MMDiTError = _PLAIN_ERRORS[kind](error["rule"], received=error["received"], fix=error["fix"])
        return known
    if kind == "OSError":
        return OSError(*error["arguments"])
    if kind == "MemoryError":
        return MemoryError(*error["arguments"])
    return ChildError(f"the process that works on the graph failed:\n{trace}")


def _ended(status: int, said: str) -> Exception:
    """What it means that the child ended without an answer."""
    number = -status
    allocation = any(words in said for words in _ALLOCATION_FAILED)
    if number == signal.SIGKILL or (number == signal.SIGABRT and allocation):
        return MachineError(
            "the work on the graph must fit in this machine's memory",
            received="the process that did it was killed" if not allocation else "an allocation failed",
            fix="close other programs, keep the weights beside the graph as external data, or take a larger machine",
        )
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return MachineError(
            "the process that works on the graph must not be stopped",
            received=signal.Signals(number).name,
            fix="start again",
        )
    if number > 0:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return UsageError(
            "an ONNX graph must be one that can be read: this one crashes what reads it",
            received=f"{name}, in a process of its own",
            fix="get the file again, or export it again; if it is sound, report this as a bug",
        )
    return ChildError(f"the process that works on the graph ended with status {status} and no answer:\n{said}")


def _end_with_caller() -> None:
    """The caller never writes a second line: what can be read here is that it is no more."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _let_it_be_killed_first() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write(_KILLED_FIRST)
    except OSError:
        pass  # not Linux
