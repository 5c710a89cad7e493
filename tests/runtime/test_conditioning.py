"""A schedule's conditioning in one call: calls with a step of it are calls with all inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import ContractError
from mmdit_deploy.runtime import Engine
from mmdit_deploy.runtime.conditioning import schedule_contract
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from random_inputs import random_inputs

SIZES = {"batch": 2, "img_tokens": 15, "txt_tokens": 4}
TIMES = torch.tensor([[1000.0, 900.0], [500.0, 400.0], [3.0, 2.0]])


@pytest.fixture(scope="module")
def feed(engine: Engine) -> dict[str, Tensor]:
    return {name: t for name, t in random_inputs(engine.contract, SIZES).items() if name != "timestep"}


@pytest.fixture(scope="module")
def others(feed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in feed.items() if name != "pooled_projections"}


@pytest.mark.parametrize("numpy", [False, True])
def test_a_step_of_a_table_is_a_call_with_all_inputs(
    engine: Engine, feed: dict[str, Tensor], others: dict[str, Tensor], numpy: bool
) -> None:
    schedule: dict[str, Any] = {"timestep": TIMES, "pooled_projections": feed["pooled_projections"]}
    if numpy:
        schedule = {name: t.numpy() for name, t in schedule.items()}
        others: Any = {name: t.numpy() for name, t in others.items()}
    table = engine.condition(schedule)
    assert len(table) == 3 and len(list(table)) == 3
    for step, conditioning in enumerate(table):
        out = engine(others, conditioning=conditioning)["sample"]
        assert isinstance(out, np.ndarray) == numpy
        assert torch.equal(torch.as_tensor(out), engine({**feed, "timestep": TIMES[step]})["sample"])


def test_a_table_is_its_own(engine: Engine, feed: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """What it was made of may change afterwards."""
    times, pooled = TIMES.clone(), feed["pooled_projections"].clone()
    table = engine.condition({"timestep": times, "pooled_projections": pooled})
    before = engine(others, conditioning=table[0])["sample"]
    times.zero_()
    pooled.zero_()
    assert torch.equal(engine(others, conditioning=table[0])["sample"], before)


def test_a_table_of_another_engine_is_refused(
    engine: Engine, tiny_bundle: Path, feed: dict[str, Tensor], others: dict[str, Tensor]
) -> None:
    table = engine.condition({"timestep": TIMES, "pooled_projections": feed["pooled_projections"]})
    with Engine.load(tiny_bundle, "ort-cpu") as other, pytest.raises(ContractError) as caught:
        other(others, conditioning=table[0])
    assert caught.value.received == "another engine's" and "engine.condition" in str(caught.value.fix)


def test_conditioning_is_not_passed_twice(engine: Engine, feed: dict[str, Tensor]) -> None:
    table = engine.condition({"timestep": TIMES, "pooled_projections": feed["pooled_projections"]})
    with pytest.raises(ContractError) as caught:
        engine(feed, conditioning=table[0])
    assert caught.value.received == "pooled_projections"


def test_a_schedule_that_breaks_the_contract(engine: Engine, feed: dict[str, Tensor]) -> None:
    pooled = feed["pooled_projections"]
    for broken, words in (
        ({"timestep": TIMES}, "missing ['pooled_projections']"),
        ({"timestep": TIMES[0], "pooled_projections": pooled}, "timestep has the axes [steps, batch]"),
        ({"timestep": TIMES.double(), "pooled_projections": pooled}, "timestep is float32"),
        ({"timestep": TIMES[:, :1], "pooled_projections": pooled}, "batch is one size in all tensors"),
        ({"timestep": TIMES[:0], "pooled_projections": pooled}, "pass at least one"),
        ({"timestep": TIMES.to("meta"), "pooled_projections": pooled}, "timestep is on the device"),
    ):
        with pytest.raises(ContractError) as caught:
            engine.condition(broken)
        assert words in str(caught.value)


def test_a_table_of_another_batch_is_refused(
    engine: Engine, feed: dict[str, Tensor], others: dict[str, Tensor]
) -> None:
    table = engine.condition({"timestep": TIMES[:, :1], "pooled_projections": feed["pooled_projections"][:1]})
    with pytest.raises(ContractError, match="batch is one size"):
        engine(others, conditioning=table[0])


def test_what_conditions_a_model(tiny_families: dict[str, ModelSpec]) -> None:
    """Its timestep; guidance and pooled text where it has them."""
    names = {
        name: [t.name for t in schedule_contract(Contract.of(spec, PRECISIONS["fp16"])).inputs]
        for name, spec in tiny_families.items()
    }
    assert names == {
        "flux1": ["timestep", "pooled_projections", "guidance"],
        "flux2": ["timestep", "guidance"],
        "qwen-image": ["timestep"],
        "qwen-image-edit-2511": ["timestep"],
        "sd3-controlnet": ["timestep", "pooled_projections"],
    }
