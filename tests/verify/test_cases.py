"""The inputs that verification runs are fixed, lie within the contract, and differ where it matters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mmdit_deploy.contract import Contract, Profile, Range, parse_profile
from mmdit_deploy.errors import UsageError
from mmdit_deploy.runtime.tensorrt import choose_profile
from mmdit_deploy.spec import PRECISIONS, QUANTIZED, ModelSpec, from_depth, precision
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


@pytest.mark.parametrize("name", [*PRECISIONS, *QUANTIZED])
def test_a_quantized_model_is_run_at_eight_timesteps_of_three_shapes(name: str) -> None:
    compute = precision(name)
    cases = default_cases(Contract.of(from_depth(24), compute), compute)
    timesteps: dict[tuple[int, ...], set[float]] = {}
    for case in cases:
        timesteps.setdefault((case.batch, case.rows, case.cols, case.txt_tokens), set()).add(case.timestep)
    least = 8 if compute.quantized else 3
    assert len(timesteps) >= 3 and all(len(found) >= least for found in timesteps.values())
    assert len(cases) == 3 * least


def has_grid(tokens: Range) -> bool:
    """Whether an image that the model has positions for has so many tokens."""
    side = SPEC.pos_max_size
    return any(rows * min(side, tokens.max // rows) >= tokens.min for rows in range(1, side + 1))


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
    assume(has_grid(ranges["img_tokens"]))
    contract = Contract.of(SPEC, FP16, ranges)
    cases = default_cases(contract, thorough=thorough)
    assert len(set(cases)) == len(cases) > 0
    for case in cases:
        sizes = {"batch": case.batch, "img_tokens": case.img_tokens, "txt_tokens": case.txt_tokens}
        contract.check({t.name: (t.dtype, t.shape(sizes)) for t in contract.inputs})
        assert max(case.rows, case.cols) <= SPEC.pos_max_size


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 5000), st.integers(0, 100))
def test_a_grid_is_kept_or_moved_into_the_range(rows: int, cols: int, least: int, more: int) -> None:
    fitted = fit_grid(rows, cols, least, least + more)
    assert least <= fitted[0] * fitted[1] <= least + more
    if least <= rows * cols <= least + more:
        assert fitted == (rows, cols)


@pytest.mark.parametrize(
    ("grid", "tokens", "fitted"),
    [
        ((20, 15), (1024, 16384), (37, 28)),
        ((16, 17), (1024, 16384), (32, 33)),
        ((16, 16), (1024, 16384), (32, 32)),
        ((64, 64), (256, 1000), (31, 32)),
        # What is not square stays so, where its tokens are only just so many.
        ((16, 17), (4096, 4096), (32, 128)),
        ((20, 15), (4096, 4096), (128, 32)),
        ((16, 17), (1, 1), (1, 1)),
        ((16, 17), (36864, 36864), (192, 192)),
    ],
)
def test_a_grid_is_moved_no_further_than_it_must(
    grid: tuple[int, int], tokens: tuple[int, int], fitted: tuple[int, int]
) -> None:
    assert fit_grid(*grid, *tokens, 192) == fitted


@given(st.integers(8, 64), st.integers(8, 64), st.integers(64, 16384))
def test_with_room_above_a_grid_keeps_near_the_minimum_and_its_aspect(rows: int, cols: int, least: int) -> None:
    height, width = fit_grid(rows, cols, least, 36864, 192)
    if rows * cols < least and max(rows / cols, cols / rows) < 2:
        assert height * width < 1.35 * least  # of so few rows, one more may be an eighth
        assert 0.7 < (height / width) / (rows / cols) < 1.4
        assert rows == cols or height != width


def test_no_grid_exceeds_the_models_positions() -> None:
    assert fit_grid(20, 15, 256, 324, 18) == (18, 15)
    with pytest.raises(UsageError, match=r"at most 192 × 192") as caught:
        fit_grid(16, 16, 211, 211, 192)  # a prime: one row of 211
    assert "211 image tokens" in str(caught.value.received) and "210" in str(caught.value.fix)


PROFILES = {
    "apart": ("img_tokens=256", "img_tokens=4096"),
    "with room between": ("img_tokens=64:64:256", "img_tokens=320:1024:4096"),
    "the README's": ("batch=2,img_tokens=1024", "batch=1:2:4,img_tokens=1024:4096:4096"),
    "one within the next": ("img_tokens=1024", "img_tokens=256:1024:4096"),
    "meeting": ("img_tokens=256:1024:4096", "img_tokens=4096:4096:16384"),
    "three": ("batch=1,img_tokens=1024", "batch=2,img_tokens=1024", "batch=4,img_tokens=1024"),
    "by text": ("txt_tokens=77", "txt_tokens=154", "txt_tokens=333"),
    "by two axes": ("batch=1:1:2,img_tokens=256:256:1024", "batch=1:1:4,img_tokens=256:1024:4096"),
}


def profiled(*texts: str) -> Contract:
    return Contract.of(from_depth(24), FP16, profiles=[parse_profile(text) for text in texts])


def lies_in(case: Case, profile: Profile) -> bool:
    sizes = {"batch": case.batch, "img_tokens": case.img_tokens, "txt_tokens": case.txt_tokens}
    return all(profile[axis].min <= size <= profile[axis].max for axis, size in sizes.items())


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("name", PROFILES)
def test_each_case_lies_in_a_profile_and_each_profile_is_run(name: str, thorough: bool) -> None:
    contract = profiled(*PROFILES[name])
    cases = default_cases(contract, thorough=thorough)
    run = set()
    for case in cases:  # by the runtime's own choice, which raises where there is none
        sizes = {"batch": case.batch, "img_tokens": case.img_tokens, "txt_tokens": case.txt_tokens}
        run.add(choose_profile(contract.profiles, sizes))
    assert run == set(range(len(contract.profiles)))
    assert len(set(cases)) == len(cases) <= 3 * (6 if thorough else 3) + len(contract.profiles) - 1


def test_a_profile_costs_one_small_case() -> None:
    few = default_cases(profiled("img_tokens=256:256:1024"))
    more = default_cases(profiled("img_tokens=256:256:1024", "img_tokens=4096"))
    assert more[:-1] == few == default_cases(Contract.of(from_depth(24), FP16))
    assert (more[-1].batch, more[-1].img_tokens, more[-1].txt_tokens) == (1, 4096, 32)


def test_a_profile_that_is_never_chosen_is_no_error() -> None:
    contract = profiled("img_tokens=256:1024:4096", "img_tokens=1024")
    cases = default_cases(contract)
    assert all(any(lies_in(case, profile) for case in cases) for profile in contract.profiles)


def test_a_profile_without_any_image_is_refused() -> None:
    with pytest.raises(UsageError, match="192 × 192"):
        default_cases(profiled("img_tokens=256", "img_tokens=4099"))


@pytest.mark.parametrize("name", PRECISIONS)
def test_inputs_are_the_contracts_and_the_same_every_time(name: str) -> None:
    contract = Contract.of(SPEC, PRECISIONS[name])
    case = Case(2, 16, 17, 32, 3.0)
    inputs = case_inputs(case, contract, SPEC)
    received = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in inputs.items()}
    assert contract.check(received) == {"batch": 2, "img_tokens": 272, "txt_tokens": 32}
    again = case_inputs(case, contract, SPEC)
    assert all(torch.equal(inputs[n], again[n]) for n in inputs)
    assert inputs["hidden_states"].float().std() == pytest.approx(1.0, abs=0.05)
    assert inputs["timestep"].tolist() == [3.0, 2.0]  # a batch does not share one timestep
    assert inputs["img_ids"].tolist()[17:19] == [[1.0, 0.0], [1.0, 1.0]]


def test_samples_of_a_batch_differ_and_timesteps_share_a_latent() -> None:
    contract = Contract.of(SPEC, FP16)
    case = Case(2, 16, 16, 8, 999.0)
    early = case_inputs(case, contract, SPEC)
    late = case_inputs(dataclasses.replace(case, timestep=0.0), contract, SPEC)
    assert torch.equal(early["hidden_states"], late["hidden_states"])
    assert not torch.equal(early["hidden_states"][0], early["hidden_states"][1])
    assert late["timestep"].tolist() == [0.0, 0.0]  # never below the schedule
