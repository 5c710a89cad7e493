"""How fast is an engine, next to what it replaces?"""

from mmdit_deploy.latency.bundle import LatencyReport, bench_bundle
from mmdit_deploy.latency.timing import Timing, time_interleaved

__all__ = ["LatencyReport", "Timing", "bench_bundle", "time_interleaved"]
