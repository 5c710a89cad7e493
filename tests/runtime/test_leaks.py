"""An engine that is loaded, called and closed again and again takes no more memory in the end than in the beginning."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mmdit_deploy.spec import ModelSpec

SLOPE = 0.01  # MB for each load
WARM_UPS = 50
# Loads an engine, calls it, closes it; prints its memory after each. What was freed is given back to the system first:
# glibc keeps it, in as many arenas as threads happened to meet. A leak cannot be given back.
CHILD = """
import ctypes, gc, json, re, sys
import torch
from mmdit_deploy.runtime import Engine

bundle, loads, leak = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
sizes = {"batch": 1, "img_tokens": 4, "txt_tokens": 2}
held, memory = [], []
gc.freeze()  # the libraries' own objects need not be looked through each time
for _ in range(loads):
    with Engine.load(bundle, "ort-cpu") as engine:
        inputs = {t.name: torch.ones(t.shape(sizes), dtype=getattr(torch, t.dtype)) for t in engine.contract.inputs}
        engine(inputs)
    held.append(b"." * leak)
    del engine
    gc.collect()
    trim(0)
    memory.append(int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1000)
print(json.dumps(memory))
"""


def growth(bundle: Path, loads: int, leak: int = 0) -> float:
    """MB that a load adds: the slope of a child's memory over its loads, after the first `WARM_UPS`.

    Args:
        leak: bytes that the child keeps of each load.
    """
    command = [sys.executable, "-c", CHILD, str(bundle), str(WARM_UPS + loads), str(leak)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)[WARM_UPS:]
    return float(np.polyfit(np.arange(loads), memory, 1)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory is its own")
@pytest.mark.parametrize(
    ("loads", "split"),
    [(80, False), pytest.param(400, False, marks=pytest.mark.soak), pytest.param(400, True, marks=pytest.mark.soak)],
)
def test_loading_and_closing_leaks_nothing(
    bundle_of: Callable[..., Path], tiny_spec: ModelSpec, loads: int, split: bool
) -> None:
    """And the measure finds a leak: of 32 KiB each."""
    bundle = bundle_of(dataclasses.replace(tiny_spec, name="least", depth=1), split=split)
    with ThreadPoolExecutor() as pool:
        clean = pool.submit(growth, bundle, loads)
        leaking = pool.submit(growth, bundle, loads, 32 * 1024)
        assert clean.result() < SLOPE < leaking.result()
