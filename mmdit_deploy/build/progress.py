"""A build that can be watched and cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
SECONDS_BETWEEN_REPORTS = 5.0


class Cancelled(Exception):
    """The build ended because it was told to."""


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

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="engine build")
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        progress.cancel()
        thread.join()
        raise
    if failure:
        raise failure[0]
    return result[0]
