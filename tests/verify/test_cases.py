"""The inputs that verification runs are fixed, lie within the contract, and differ where it matters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth
from mmdit_deploy.verify import Case, default_cases
from mmdit_deploy.verify.cases import case_inputs, fit_grid

SPEC = ModelSpec("m", depth=1, num_heads=1, txt_dim=24, pooled_dim=20)
FP16 = PRECISIONS["fp16"]


def test_the_defaults_are_few_and_small() -> None:
    cases = default_cases(Contract.of(from_depth(24), FP16))
    assert len({(c.batch, c.rows, c.cols, c.txt_tokens) for c in cases}) == 3
    assert len({c.timestep for c in cases}) == 3
    assert all(c.img_tokens + c.txt_tokens <= 512 for c in cases)
    thorough = default_cases(Contract.of(from_depth(24), FP16), thorough=True)
    assert thorough[: len(cases)] == cases
    assert max(c.img_tokens for c in thorough) == 4096


@given(
    st.tuples(*(st.integers(1, 8) for _ in range(3))),
    st.tuples(*(st.integers(1, 16384) for _ in range(3))),
    st.tuples(*(st.integers(1, 600) for _ in range(3))),
    st.booleans(),
)
def test_every_case_is_within_the_contract(
    batch: tuple[int, ...], img: tuple[int, ...], txt: tuple[int, ...], thorough: bool
) -> None:
    ranges = {
        axis: Range(*sorted(sizes)) for axis, sizes in (("batch", batch), ("img_tokens", img), ("txt_tokens", txt))
    }
    contract = Contract.of(SPEC, FP16, ranges)
    cases = default_cases(contract, thorough=thorough)
    assert len(set(cases)) == len(cases) > 0
    for case in cases:
        sizes = {"batch": case.batch, "img_tokens": case.img_tokens, "txt_tokens": case.txt_tokens}
        contract.check({t.name: (t.dtype, t.shape(sizes)) for t in contract.inputs})


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 5000), st.integers(0, 100))
def test_a_grid_is_kept_or_moved_into_the_range(rows: int, cols: int, least: int, more: int) -> None:
    fitted = fit_grid(rows, cols, least, least + more)
    assert least <= fitted[0] * fitted[1] <= least + more
    if least <= rows * cols <= least + more:
        assert fitted == (rows, cols)


@pytest.mark.parametrize("name", PRECISIONS)
def test_inputs_are_the_contracts_and_the_same_every_time(name: str) -> None:
    contract = Contract.of(SPEC, PRECISIONS[name])
    case = Case(2, 16, 17, 32, 3.0)
    inputs = case_inputs(case, contract)
    received = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in inputs.items()}
    assert contract.check(received) == {"batch": 2, "img_tokens": 272, "txt_tokens": 32}
    again = case_inputs(case, contract)
    assert all(torch.equal(inputs[n], again[n]) for n in inputs)
    assert inputs["hidden_states"].float().std() == pytest.approx(1.0, abs=0.05)
    assert inputs["timestep"].tolist() == [3.0, 2.0]  # a batch does not share one timestep
    assert inputs["img_ids"].tolist()[17:19] == [[1.0, 0.0], [1.0, 1.0]]


def test_samples_of_a_batch_differ_and_timesteps_share_a_latent() -> None:
    contract = Contract.of(SPEC, FP16)
    case = Case(2, 16, 16, 8, 999.0)
    early = case_inputs(case, contract)
    late = case_inputs(dataclasses.replace(case, timestep=0.0), contract)
    assert torch.equal(early["hidden_states"], late["hidden_states"])
    assert not torch.equal(early["hidden_states"][0], early["hidden_states"][1])
    assert late["timestep"].tolist() == [0.0, 0.0]  # never below the schedule
