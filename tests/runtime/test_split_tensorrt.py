"""A model in two parts, each of TensorRT engine files, on a fake of TensorRT (`fake_tensorrt`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.errors import ContractError, MachineError
from mmdit_deploy.runtime import Engine

STEPS = 13  # of two or three samples: more than the 16 rows that the conditioning takes at once
Load = Callable[..., Engine]


@pytest.fixture
def load(build: Callable[..., Any], bundled: Callable[..., Any], chain: Any) -> Load:
    """``load(target="rtx:sm89", profiles=…, **options)``: the engine in two parts."""

    def loaded(target: str = "rtx:sm89", profiles: Any = None, **options: Any) -> Engine:
        trunk, _ = build(target, profiles or (chain.ranges,), segments=chain.trunk, part="trunk")
        rows = (chain.split.conditioning.ranges,)
        conditioning, _ = build(target, rows, segments=chain.conditioning, part="conditioning")
        return Engine(bundled({target: trunk}, conditioning), target, **options)

    return loaded


def whole(chain: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model gives, computed without any runtime."""
    return chain.expected(inputs, (*chain.conditioning, *chain.trunk))


def same(received: dict[str, Any], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(received[name], tensor) for name, tensor in expected.items())


def schedule(batch: int) -> Tensor:
    return torch.linspace(1000, 1, STEPS)[:, None] - torch.arange(batch)


@pytest.mark.parametrize("target", ["rtx:sm89", "trt"])
@pytest.mark.parametrize("conditioning", ["resident", "released"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_its_parts_run_as_one_model(
    fake: Any, chain: Any, load: Load, target: str, conditioning: str, cuda_graphs: bool
) -> None:
    """In a call with all inputs, and in each step of a schedule; a step's row lies at any address of the table."""
    with load(target, conditioning=conditioning, cuda_graphs=cuda_graphs) as engine:
        for batch in (3, 2):
            inputs = chain.feed(batch)
            assert same(engine(inputs), whole(chain, inputs))
            times = schedule(batch)
            table = engine.condition({"timestep": times})
            others = {"hidden_states": inputs["hidden_states"]}
            assert len({row.tensors["modulation"].data_ptr() % 64 for row in table}) > 1  # TensorRT takes few of these
            for step in (0, STEPS - 1, 5, 5):
                out = engine(others, conditioning=table[step])
                assert same(out, whole(chain, {**inputs, "timestep": times[step]})), step


def test_a_schedule_is_made_in_as_many_calls_as_its_rows_need(fake: Any, chain: Any, load: Load) -> None:
    engine = load()
    before = fake.count("run conditioning-0")
    table = engine.condition({"timestep": schedule(3)})
    assert fake.count("run conditioning-0") - before == 3  # 5 + 5 + 3 steps of 3 samples, 16 rows at once
    engine({"hidden_states": chain.feed(3)["hidden_states"]}, conditioning=table[0])
    assert fake.count("run conditioning-0") - before == 3 and fake.count("run trunk-2") == 1


def test_released_conditioning_holds_nothing_of_the_gpu_between_schedules(fake: Any, chain: Any, load: Load) -> None:
    engine = load(conditioning="released")
    assert fake.loaded == ["trunk-0", "trunk-1", "trunk-2"]
    engine.condition({"timestep": schedule(2)})
    engine.condition({"timestep": schedule(2)})
    assert fake.loaded[3:] == ["conditioning-0"] * 2
    last_run = max(i for i, event in enumerate(fake.events) if event.startswith("run conditioning"))
    assert "synchronize" in fake.events[last_run:]  # what is freed is no longer run


def test_sizes_that_no_profile_of_the_trunk_holds_are_refused_and_nothing_is_written(
    fake: Any, chain: Any, load: Load
) -> None:
    engine = load(profiles=(chain.narrow,))
    inputs = chain.feed(2, 4)
    mine = {name: torch.full_like(t, 7) for name, t in whole(chain, inputs).items()}
    with pytest.raises(ContractError, match="within one profile"):
        engine(inputs, outputs=mine)
    table = engine.condition({"timestep": schedule(2)})
    with pytest.raises(ContractError, match="within one profile"):
        engine({"hidden_states": inputs["hidden_states"]}, conditioning=table[0], outputs=mine)
    assert all(tensor.eq(7).all() for tensor in mine.values())


@pytest.mark.parametrize("refuses", ["load", "context", "profile"])
def test_a_part_that_does_not_load_is_an_error(fake: Any, chain: Any, load: Load, refuses: str) -> None:
    engine = load(conditioning="released")
    fake.refuses = refuses
    with pytest.raises(MachineError, match="conditioning-0"):
        engine.condition({"timestep": schedule(2)})
    fake.refuses = None
    assert len(engine.condition({"timestep": schedule(2)})) == STEPS  # the next one is loaded again


@pytest.mark.parametrize("conditioning", ["resident", "released"])
def test_threads_may_make_tables_and_take_steps_at_once(chain: Any, fake: Any, load: Load, conditioning: str) -> None:
    engine = load(conditioning=conditioning)
    feeds = [chain.feed(batch, tokens, seed) for seed, (batch, tokens) in enumerate([(1, 4), (2, 9), (3, 12), (4, 6)])]

    def work(seed: int) -> bool:
        order = random.Random(seed)
        right = True
        for _ in range(10):
            inputs = feeds[order.randrange(len(feeds))]
            batch = len(inputs["timestep"])
            table, step = engine.condition({"timestep": schedule(batch)}), order.randrange(STEPS)
            out = engine({"hidden_states": inputs["hidden_states"]}, conditioning=table[step])
            right &= same(out, whole(chain, {**inputs, "timestep": schedule(batch)[step]}))
            right &= same(engine(inputs), whole(chain, inputs))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
