"""A build that can be watched and cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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

    def cancel(self) -> None:
        """End the build at its next step."""
        self._cancel.set()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

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
            return progress.step(phase_name, step)

    return _Monitor()


def run_cancellable(work: Callable[[], T], progress: BuildProgress) -> T:
    """Run work in a thread, so that Ctrl-C is seen while the builder computes.

    Python runs signal handlers in the main thread, between its own steps; inside one long call of C++ there are none.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the builder has stopped.
    """
    result: list[T] = []
    failure: list[BaseException] = []
    # Not `Thread.join`: Python 3.11 takes a thread for ended when Ctrl-C interrupts it.
    begin, ended = threading.Event(), threading.Event()

    def run() -> None:
        begin.wait()
        try:
            if not progress.cancelled:
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
    if failure:
        raise failure[0]
    return result[0]
