"""What tests let a child do: answer, fail, crash, wait. It is imported there, so it imports little."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from typing import Any

from mmdit_deploy.errors import GraphError, UsageError


def answer(request: dict[str, Any]) -> Any:
    print("this is no answer")
    os.write(1, b"nor is this")
    return {"got": request["value"], "pid": os.getpid()}


def segfault(_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def abort(_: object) -> None:
    os.abort()


def abort_without_memory(_: object) -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def killed(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminated(_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def exits(_: object) -> None:
    os._exit(7)


def too_deep(_: object) -> None:
    try:
        too_deep(_)
    except RecursionError as error:
        raise GraphError("the pass 'deep' failed") from error


def refuses(_: object) -> None:
    raise UsageError("the rule", received="what came", fix="what helps")


def fails(_: object) -> None:
    raise GraphError("the pass failed", received="this", fix="that")


def disk_full(_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "out.onnx")


def no_memory(_: object) -> None:
    raise MemoryError("Unable to allocate 9 TB")


def bug(_: object) -> None:
    raise KeyError("a bug")


def waits(_: object) -> None:
    time.sleep(600)


def write_and_crash(request: dict[str, Any]) -> None:
    work_and_peak(request)
    segfault(request)


def peak(_: object) -> int:
    """Bytes of memory that a process has held at most when all that the work needs is imported."""
    from mmdit_deploy.graph import surgery

    assert surgery.FUSE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work_and_peak(request: dict[str, Any]) -> dict[str, Any]:
    from mmdit_deploy.graph import surgery

    return {**surgery.work(request), "peak": peak(None)}
