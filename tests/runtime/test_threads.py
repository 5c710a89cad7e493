"""One engine, many threads: calls of mixed shapes, equal to the bit to the same calls one after another."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.errors import MachineError
from mmdit_deploy.model import grid_ids
from mmdit_deploy.runtime import Conditioning, Engine
from mmdit_deploy.spec import ModelSpec
from random_inputs import random_inputs

THREADS = 8
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 3, 4),
    (2, 3, 5, 4),
    (1, 4, 4, 9),
    (3, 2, 2, 2),
    (1, 6, 5, 3),
    (2, 1, 7, 6),
    (4, 3, 3, 5),
]


def feed(engine: Engine, shape: tuple[int, int, int, int], seed: int) -> dict[str, Tensor]:
    batch, rows, cols, txt_tokens = shape
    sizes = {"batch": batch, "img_tokens": rows * cols, "txt_tokens": txt_tokens}
    values = random_inputs(engine.contract, sizes, seed)
    return {**values, "timestep": torch.linspace(900, 100, batch), "img_ids": grid_ids(rows, cols)}


@pytest.mark.parametrize(
    ("split", "conditioning", "calls"), [(False, "resident", 250), (True, "resident", 250), (True, "released", 25)]
)
def test_calls_of_many_threads_do_not_disturb_each_other(
    bundle_of: Callable[..., Path], tiny_spec: ModelSpec, split: bool, conditioning: str, calls: int
) -> None:
    """In turns with new outputs, outputs given, numpy, a table of conditioning, and one that is made meanwhile."""
    with Engine.load(bundle_of(tiny_spec, split=split), "ort-cpu", conditioning=conditioning) as engine:
        feeds = [feed(engine, shape, seed) for seed, shape in enumerate(SHAPES)]
        expected = [engine(inputs)["sample"] for inputs in feeds]
        schedules = [{n: t for n, t in f.items() if n in ("timestep", "pooled_projections")} for f in feeds]

        def made(schedule: dict[str, Tensor]) -> Conditioning:
            return engine.condition({**schedule, "timestep": schedule["timestep"][None]})

        tables = [made(schedule) for schedule in schedules]
        together = threading.Barrier(THREADS)

        def call(index: int, how: int) -> Tensor:
            inputs = feeds[index]
            if how == 0:
                return engine(inputs)["sample"]
            if how == 1:
                mine = torch.full_like(expected[index], torch.nan)
                return engine(inputs, outputs={"sample": mine})["sample"]
            if how == 2:
                return torch.from_numpy(engine({n: t.numpy() for n, t in inputs.items()})["sample"])
            others = {n: t for n, t in inputs.items() if n not in schedules[index]}
            table = tables[index] if how == 3 else made(schedules[index])
            return engine(others, conditioning=table[0])["sample"]

        def work(seed: int) -> int:
            order = random.Random(seed)
            together.wait()
            wrong = 0
            for _ in range(calls):
                index = order.randrange(len(feeds))
                wrong += not torch.equal(call(index, order.randrange(5)), expected[index])
            return wrong

        with ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(work, range(THREADS))) == [0] * THREADS


def close_in_flight(engine: Engine, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Calls until the engine is closed, which another thread does meanwhile; each is right, or says so."""
    running = threading.Barrier(THREADS + 1)

    def right() -> bool:
        received = engine(inputs)
        return all(torch.equal(received[name], t) for name, t in expected.items())

    def work() -> str:
        assert right()
        running.wait()
        while True:
            try:
                assert right()
            except MachineError as error:
                return str(error.received)

    with ThreadPoolExecutor(THREADS) as pool:
        ends = [pool.submit(work) for _ in range(THREADS)]
        running.wait()
        engine.close()
        assert {end.result(timeout=60) for end in ends} == {"it was closed"}


@pytest.mark.parametrize("split", [False, True])
def test_an_engine_may_be_closed_while_others_call_it(
    bundle_of: Callable[..., Path], tiny_spec: ModelSpec, split: bool
) -> None:
    for _ in range(5):
        engine = Engine.load(bundle_of(tiny_spec, split=split), "ort-cpu", verify=False)
        inputs = feed(engine, SHAPES[2], 0)
        close_in_flight(engine, inputs, engine(inputs))


def test_a_tensorrt_engine_may_be_closed_while_others_call_it(
    fake: Any, chain: Any, bundled: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """What is freed is no longer run: a call comes whole before the closing, or not at all."""
    for cuda_graphs in (False, True):
        engine = Engine(bundled({"trt": build("trt")[0]}), "trt", cuda_graphs=cuda_graphs)
        inputs = chain.feed()
        close_in_flight(engine, inputs, chain.expected(inputs))
        last_run = max(i for i, event in enumerate(fake.events) if event.startswith(("run", "replay")))
        assert "synchronize" in fake.events[last_run:]


def test_tensorrt_calls_take_turns(
    fake: Any, chain: Any, bundled: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """They share activation memory and execution contexts: segments of two calls never mix."""
    engine = Engine(bundled({"rtx:sm89": build()[0]}), "rtx:sm89")
    feeds = [chain.feed(batch, tokens, seed) for seed, (batch, tokens) in enumerate([(1, 4), (2, 9), (3, 12), (4, 6)])]
    expected = [chain.expected(inputs) for inputs in feeds]

    def work(index: int) -> bool:
        received = [engine(feeds[index]) for _ in range(20)]
        return all(torch.equal(out[name], t) for out in received for name, t in expected[index].items())

    with ThreadPoolExecutor(len(feeds)) as pool:
        assert all(pool.map(work, range(len(feeds))))
    runs = [event.split()[1] for event in fake.events if event.startswith("run")]
    assert runs == ["segment-0", "segment-1", "segment-2"] * 80
