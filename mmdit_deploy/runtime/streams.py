"""CUDA streams: an engine's work comes after what the caller's stream holds, and before what it gets next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WorkStream:
    """The stream that an engine's work is enqueued on, call after call. The host never waits for any of it.

    It is the caller's own, unless that is CUDA's default stream: there, TensorRT waits for the device around each call
    (`IExecutionContext.execute_async_v3`), and nothing can be captured into a graph. Work then goes to a stream beside
    it, which waits for the default stream, and which the default stream waits for.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.own: torch.cuda.Stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None
        self._done = torch.cuda.Event()

    @contextmanager
    def working(self) -> Iterator[torch.cuda.Stream]:
        """The stream to enqueue on, as torch's current one.

        Calls of one engine share its activation memory. So a call on another stream than the call before waits for it.
        """
        caller = torch.cuda.current_stream(self._device)
        work = self.own if caller.cuda_stream == 0 else caller
        if work is not caller:
            work.wait_stream(caller)
        if self._last is not None and self._last != work:
            work.wait_event(self._done)
        try:
            with torch.cuda.stream(work):
                yield work
        finally:
            self._done.record(work)
            self._last = work
            if work is not caller:
                caller.wait_stream(work)
