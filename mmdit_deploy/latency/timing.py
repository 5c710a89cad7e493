"""Time rivals side by side: interleaved, after warm-up, in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Run = Callable[[], object]

# Below this, a call is timed right after an untimed one of the same rival: the thread pool of the rival before it
# still spins, and its own has gone to sleep. Eager PyTorch on two cores, 1 ms a call: 15 to 130 ms without.
SETTLE_MS = 200.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one rival.

    Args:
        name: ``ort-cpu``, ``eager``, ``torch.compile``.
        how: what ran, in words.
        p50_ms, p90_ms: median and 90th percentile.
        rounds: calls measured.
    """

    name: str
    how: str
    p50_ms: float
    p90_ms: float
    rounds: int


def time_interleaved(
    rivals: Mapping[str, tuple[str, Run]], device: torch.device, *, rounds: int, warmup: int
) -> tuple[Timing, ...]:
    """Call every rival once per round, so that drift of the machine hits all alike.

    Args:
        rivals: (what it is in words, the call) by name.
        device: on CUDA, times come from events on the current stream and end when the GPU is done.
        rounds: at least 1.
        warmup: rounds that are not counted.
    """
    measure = _cuda_ms if device.type == "cuda" else _wall_ms
    for _ in range(warmup):
        for _, run in rivals.values():
            measure(run)
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, (_, run) in rivals.items():
            first = measure(run)
            samples[name].append(measure(run) if first < SETTLE_MS else first)
    return tuple(
        Timing(name, how, median(samples[name]), _p90(samples[name]), rounds) for name, (how, _) in rivals.items()
    )


def _wall_ms(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    # Runtimes with a stream of their own return when they are done; the wait covers those that do not.
    torch.cuda.synchronize()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _p90(values: list[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[8] if len(values) > 1 else values[0]
