"""A build that can be watched, and that Ctrl-C ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch

from mmdit_deploy.build import progress as module
from mmdit_deploy.build.progress import BuildProgress, run_cancellable, trt_monitor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which stands still; set ``now``."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a shell may have had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_report_every_few_seconds(clock: SimpleNamespace) -> None:
    said: list[tuple[str, int, int]] = []
    progress = BuildProgress(lambda *args: said.append(args))
    progress.start("tactics", 300)
    for step in range(300):
        clock.now += 0.5
        assert progress.step("tactics", step)
    assert len(said) == 150 / module.SECONDS_BETWEEN_REPORTS
    assert {(phase, steps) for phase, _, steps in said} == {("tactics", 300)}
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)


def test_a_step_of_a_phase_that_was_not_announced(clock: SimpleNamespace) -> None:
    said: list[tuple[str, int, int]] = []
    progress = BuildProgress(lambda *args: said.append(args))
    clock.now += module.SECONDS_BETWEEN_REPORTS
    assert progress.step("surprise", 7) and said == [("surprise", 7, 7)]


def test_without_a_report_it_is_cancelled_all_the_same() -> None:
    progress = BuildProgress(None)
    assert progress.step("a", 0) and not progress.cancelled
    progress.cancel()
    assert not progress.step("a", 1) and progress.cancelled


def test_tensorrt_is_given_a_monitor_of_its_kind(clock: SimpleNamespace) -> None:
    class IProgressMonitor:
        def __init__(self) -> None:
            self.made = True

    said: list[tuple[str, int, int]] = []
    progress = BuildProgress(lambda *args: said.append(args))
    monitor = trt_monitor(SimpleNamespace(IProgressMonitor=IProgressMonitor), progress)
    assert isinstance(monitor, IProgressMonitor) and monitor.made
    monitor.phase_start("building", None, 4)
    clock.now += module.SECONDS_BETWEEN_REPORTS
    assert monitor.step_complete("building", 1)
    monitor.phase_finish("building")
    progress.cancel()
    assert not monitor.step_complete("building", 2)
    assert said == [("building", 1, 4)]


def test_work_gives_its_result_and_its_error() -> None:
    assert run_cancellable(lambda: 7, BuildProgress(None)) == 7

    def fail() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError, match="oops"):
        run_cancellable(fail, BuildProgress(None))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_seen_while_the_work_computes_and_waits_for_its_end() -> None:
    """Nothing may be cleaned up under a builder that still writes."""
    progress, events = BuildProgress(None), []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while progress.step("building", 0):
            time.sleep(0.01)
        time.sleep(0.1)
        events.append("the builder has stopped")

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, progress)
    events.append("it is cleaned up")
    assert events == ["the builder has stopped", "it is cleaned up"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_pressed_again_and_again_waits_all_the_same() -> None:
    progress, events = BuildProgress(None), []

    def work() -> None:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
        assert progress.cancelled
        events.append("the builder has stopped")

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, progress)
    assert events == ["the builder has stopped"]


def test_what_a_callback_raises_ends_the_build_and_gets_out(clock: SimpleNamespace) -> None:
    """It goes before what the builder then fails with."""

    def report(*_: object) -> None:
        raise BrokenPipeError("nobody reads")

    class IProgressMonitor:
        pass

    progress = BuildProgress(report)
    monitor = trt_monitor(SimpleNamespace(IProgressMonitor=IProgressMonitor), progress)

    def work() -> None:
        assert monitor.step_complete("building", 0)
        clock.now += module.SECONDS_BETWEEN_REPORTS
        assert monitor.step_complete("building", 1) is False
        assert progress.cancelled
        with progress.callback():
            raise ZeroDivisionError("a second one")
        raise RuntimeError("build cancelled")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        run_cancellable(work, progress)


def test_a_cancelled_build_is_no_failure_of_the_graph() -> None:
    """Whether it was cancelled before, in or after the builder's last step."""
    progress = BuildProgress(None)

    def work() -> bool:
        progress.cancel()
        return False

    for _ in range(2):
        with pytest.raises(CancelledError, match="the build was cancelled"):
            run_cancellable(work, progress)


def test_work_that_ends_well_all_the_same_does_not_hide_it() -> None:
    progress = BuildProgress(None)

    def work() -> int:
        with progress.callback():
            raise OSError("the log is not whole")
        return 7

    with pytest.raises(OSError, match="not whole"):
        run_cancellable(work, progress)


def test_the_work_is_done_on_the_callers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a thread's own, and a new thread's the first."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(current, "index", index))
    for index in (1, 0):
        torch.cuda.set_device(index)
        assert run_cancellable(torch.cuda.current_device, BuildProgress(None)) == index


def test_without_cuda_no_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was begun with"))
    assert run_cancellable(lambda: 7, BuildProgress(None)) == 7


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_goes_before_what_the_work_failed_with() -> None:
    """A builder that was cancelled fails: that is not the news."""
    progress = BuildProgress(None)

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while progress.step("building", 0):
            time.sleep(0.01)
        raise RuntimeError("build cancelled")

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, progress)
