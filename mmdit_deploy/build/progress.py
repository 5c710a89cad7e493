"""A build that can be watched and cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
SECONDS_BETWEEN_REPORTS = 5.0


class BuildProgress:
    """Where a build is.

    Args:
        report: called with a phase's name, the step and the number of steps, at most every few seconds.
    """

    def __init__(self, report: Progress | None):
        self._report = report
        self._steps: dict[str, int] = {}
        self._last = time.monotonic()
        self._cancel = threading.Event()
        self._failure: BaseException | None = None

    def cancel(self) -> None:
        """End the build at its next step."""
        self._cancel.set()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    @contextmanager
    def callback(self) -> Iterator[None]:
        """Around what the builder calls, which no exception may cross: what is raised inside cancels the build."""
        try:
            yield
        except BaseException as error:
            self._failure = self._failure or error
            self.cancel()

    def check(self) -> None:
        """After the builder has returned.

        Raises:
            BaseException: the first that a callback raised.
            CancelledError: somebody has cancelled the build.
        """
        if self._failure is not None:
            raise self._failure
        if self.cancelled:
            raise CancelledError("the build was cancelled")

    def start(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps

    def step(self, phase: str, done: int) -> bool:
        """Returns whether to go on."""
        now = time.monotonic()
        if self._report is not None and now - self._last >= SECONDS_BETWEEN_REPORTS:
            self._last = now
            self._report(phase, done, self._steps.get(phase, done))
        return not self.cancelled


def trt_monitor(trt: Any, progress: BuildProgress) -> Any:
    """The progress as TensorRT wants it. The class can only be made where the module is."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            go_on = False
            with progress.callback():
                go_on = progress.step(phase_name, step)
            return go_on

    return _Monitor()


def run_cancellable(work: Callable[[], T], progress: BuildProgress) -> T:
    """Run work in a thread, so that Ctrl-C is seen while the builder computes. Torch's current GPU is the caller's.

    Python runs signal handlers in the main thread, between its own steps; inside one long call of C++ there are none.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the builder has stopped.
        CancelledError: `progress` was cancelled.
        BaseException: what one of the builder's callbacks raised, or else the work.
    """
    take_gpu = _current_gpu()
    result: list[T] = []
    failure: list[BaseException] = []
    # Not `Thread.join`: Python 3.11 takes a thread for ended when Ctrl-C interrupts it.
    begin, ended = threading.Event(), threading.Event()

    def run() -> None:
        begin.wait()
        try:
            if not progress.cancelled:
                take_gpu()
                result.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="engine build").start()
    except BaseException:  # Ctrl-C: the thread may be there, with nothing to do
        progress.cancel()
        begin.set()
        raise
    interrupt: BaseException | None = None  # whatever a signal handler raises
    while True:
        try:
            begin.set()
            if ended.wait(0.1):
                break
        except BaseException as error:  # nothing may be cleaned up under a builder that still writes
            progress.cancel()
            interrupt = error
    if interrupt is not None:
        raise interrupt
    progress.check()
    if failure:
        raise failure[0]
    return result[0]


def _current_gpu() -> Callable[[], None]:
    """What makes this thread's current GPU another thread's: a new thread's is always the first.

    Where torch has not begun with CUDA, nobody has chosen one.
    """
    import torch

    if not torch.cuda.is_initialized():
        return lambda: None
    index = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(index)
