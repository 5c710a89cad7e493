"""How the benchmarks measure: peak memory of a job's processes, and rivals interleaved.

Peak memory is the sampled anonymous resident memory (RssAnon) of a process and its descendants. Mapped weights are
not memory: the kernel may drop them at any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

SAMPLE_SECONDS = 0.02
SETTLE_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One finished command.

    Args:
        seconds: wall time.
        peak_bytes: largest sum of RssAnon over its processes, sampled every 20 ms.
        output: what it printed on standard output.
    """

    seconds: float
    peak_bytes: int
    output: str


def run_job(command: Sequence[str | Path], **kwargs: Any) -> Job:
    """Run a command to its end and sample its memory.

    Raises:
        RuntimeError: it failed; the message ends with what it printed on standard error.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    ) as process:
        import threading

        captured: dict[str, str] = {}

        def drain(name: str, stream: Any) -> None:
            captured[name] = stream.read()

        drains = [
            threading.Thread(target=drain, args=(name, stream))
            for name, stream in (("out", process.stdout), ("err", process.stderr))
        ]
        for thread in drains:
            thread.start()
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        for thread in drains:
            thread.join()
    if process.returncode:
        raise RuntimeError(f"{command} exited with {process.returncode}\n{captured['err'][-3000:]}")
    return Job(seconds, peak, captured["out"])


def _anonymous_bytes(pid: int) -> int:
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue  # it ended meanwhile
    return total


def interleaved(rivals: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds per call of each rival, one after the other in every round, so that drift hits all alike.

    A pause before each call lets the worker threads of the rival before it stop spinning.
    """
    for _ in range(warmup):
        for run in rivals.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def p50_p90(values: Sequence[float]) -> tuple[float, float]:
    """Median and 90th percentile."""
    return median(values), quantiles(values, n=10, method="inclusive")[8] if len(values) > 1 else values[0]


def write_result(name: str, data: Mapping[str, Any]) -> None:
    """Write bench/results/<name>.json, and print it as the last line."""
    from mmdit_deploy.export import versions
    from mmdit_deploy.machine import machine_facts

    record = {"benchmark": name, "machine": machine_facts(), "versions": versions(), **data}
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    sys.stdout.flush()
