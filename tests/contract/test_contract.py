"""The I/O table: names, axes and ranges, and what is refused before a runtime sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from mmdit_deploy.contract import AXES, DEFAULT_RANGES, Contract, Range, SplitContract, TensorSpec
from mmdit_deploy.errors import ContractError, MMDiTError, UsageError
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth

Received = dict[str, tuple[str, tuple[int, ...]]]
SIZES = {"batch": 2, "img_tokens": 300, "txt_tokens": 9}


@pytest.fixture
def contract(tiny_spec: ModelSpec) -> Contract:
    return Contract.of(tiny_spec, PRECISIONS["fp16"])


def received(contract: Contract, **sizes: int) -> Received:
    """What a caller with right tensors passes."""
    return {t.name: (t.dtype, t.shape({**SIZES, **sizes})) for t in contract.inputs}


def refusal(contract: Contract, tensors: Received) -> MMDiTError:
    with pytest.raises(ContractError) as caught:
        contract.check(tensors)
    assert caught.value.rule and caught.value.received and caught.value.fix
    assert caught.value.exit_status == 2
    return caught.value


def test_the_table_of_the_design() -> None:
    contract = Contract.of(from_depth(24), PRECISIONS["fp16"])
    assert {t.name: (t.axes, t.dtype) for t in contract.inputs} == {
        "hidden_states": (("batch", "img_tokens", 64), "float16"),
        "encoder_hidden_states": (("batch", "txt_tokens", 4096), "float16"),
        "timestep": (("batch",), "float32"),
        "pooled_projections": (("batch", 2048), "float16"),
        "img_ids": (("img_tokens", 2), "float32"),
    }
    assert {t.name: (t.axes, t.dtype) for t in contract.outputs} == {"sample": (("batch", "img_tokens", 64), "float16")}
    assert {axis: str(r) for axis, r in contract.ranges.items()} == {
        "batch": "1:2:4",
        "img_tokens": "256:4096:16384",
        "txt_tokens": "2:333:512",
    }


def test_block_outputs_are_outputs(tiny_spec: ModelSpec) -> None:
    contract = Contract.of(tiny_spec, PRECISIONS["bf16"], outputs=("blocks.1",))
    assert [(t.name, t.axes) for t in contract.outputs] == [
        ("sample", ("batch", "img_tokens", tiny_spec.out_dim)),
        ("blocks.1", ("batch", "img_tokens", tiny_spec.width)),
    ]


@pytest.mark.parametrize(
    ("text", "expected"), [("1:2:4", Range(1, 2, 4)), ("7", Range(7, 7, 7)), ("3:3:3", Range(3, 3, 3))]
)
def test_ranges_are_read(text: str, expected: Range) -> None:
    assert Range.parse("batch", text) == expected
    assert Range.parse("batch", str(expected)) == expected


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "text",
    [
        "4:2:8",
        "1:9:8",
        "0:1:2",
        "0",
        "one:two:three",
        "1:2",
        "1:2:3:4",
        "",
        "-1:2:3",
        "1.5",
        "1::2",
        " 1:2:3",
    ],
)
def test_what_is_no_range_is_refused(axis: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Range.parse(axis, text)
    assert axis in caught.value.rule and text in (caught.value.received or "")
    assert str(DEFAULT_RANGES[axis]) in (caught.value.fix or "")


def test_sizes_come_back(contract: Contract) -> None:
    assert contract.check(received(contract)) == SIZES
    for axis, allowed in contract.ranges.items():
        for size in (allowed.min, allowed.max):
            assert contract.check(received(contract, **{axis: size}))[axis] == size


@pytest.mark.parametrize(
    ("axis", "size"),
    [
        ("batch", 5),
        ("batch", 0),
        ("img_tokens", 255),
        ("img_tokens", 16385),
        ("txt_tokens", 1),
        ("txt_tokens", 513),
    ],
)
def test_a_size_out_of_range_names_axis_value_and_range(contract: Contract, axis: str, size: int) -> None:
    contract = Contract(contract.inputs, contract.outputs, DEFAULT_RANGES)
    error = refusal(contract, received(contract, **{axis: size}))
    allowed = contract.ranges[axis]
    assert f"{axis} must be {allowed.min} to {allowed.max}" in error.rule
    assert error.received is not None and error.received.startswith(f"{size} ")
    if size == 0:
        assert error.fix == "pass at least one"  # no range may begin at 0
        return
    option, _, text = (error.fix or "").removeprefix("export with --").partition(" ")
    widened = Range.parse(axis, text)  # the fix is an option that works
    assert option.replace("-", "_") == axis and widened.min <= size <= widened.max


@pytest.mark.parametrize(
    ("change", "rule", "shown"),
    [
        ({"hidden_states": ("float32", (2, 300, 16))}, "hidden_states is float16", "float32"),
        ({"timestep": ("float16", (2,))}, "timestep is float32", "float16"),
        (
            {"hidden_states": ("float16", (300, 16))},
            "hidden_states has the axes [batch, img_tokens, 16]",
            "[300, 16]",
        ),
        ({"img_ids": ("float32", (300, 3))}, "img_ids has the axes [img_tokens, 2]", "[300, 3]"),
        (
            {"img_ids": ("float32", (299, 2))},
            "img_tokens is one size",
            "300 in hidden_states, 299 in img_ids",
        ),
        ({"timestep": ("float32", (1,))}, "batch is one size", "2 in hidden_states, 1 in timestep"),
        ({"guidance": ("float32", (2,))}, "the inputs are hidden_states", "guidance"),
    ],
)
def test_a_wrong_tensor_is_named(contract: Contract, change: dict[str, Any], rule: str, shown: str) -> None:
    error = refusal(contract, {**received(contract), **change})
    assert rule in error.rule and shown in (error.received or "")


def test_a_missing_tensor_is_named(contract: Contract) -> None:
    tensors = received(contract)
    del tensors["img_ids"]
    assert "missing ['img_ids']" in str(refusal(contract, tensors))


def test_no_more_image_tokens_than_positions(tiny_spec: ModelSpec) -> None:
    limit = tiny_spec.max_img_tokens
    assert Contract.of(tiny_spec, PRECISIONS["fp32"]).ranges["img_tokens"] == Range(256, 4096, limit)
    allowed = {"img_tokens": Range(1, 64, limit)}
    assert Contract.of(tiny_spec, PRECISIONS["fp32"], allowed).ranges["img_tokens"].max == limit
    with pytest.raises(UsageError) as caught:
        Contract.of(tiny_spec, PRECISIONS["fp32"], {"img_tokens": Range(1, 64, limit + 1)})
    assert f"72 × 72 = {limit}" in caught.value.rule
    assert str(limit + 1) in str(caught.value.received) and str(limit) in str(caught.value.fix)


def test_positions_that_rotate_have_no_bound(tiny_families: Mapping[str, ModelSpec]) -> None:
    many = {"img_tokens": Range(1, 4096, 200_000)}
    contract = Contract.of(tiny_families["flux1"], PRECISIONS["fp16"], many)
    assert contract.max_side is None and contract.ranges["img_tokens"] == many["img_tokens"]


def test_outputs_of_single_blocks_are_of_all_tokens(tiny_families: Mapping[str, ModelSpec], family: str) -> None:
    spec = tiny_families[family]
    contract = Contract.of(spec, PRECISIONS["bf16"], outputs=spec.block_names)
    assert {t.name: t.shape(SIZES) for t in contract.outputs} == {
        "sample": (2, 300, spec.out_dim),
        **{f"blocks.{i}": (2, 300, 64) for i in range(spec.depth)},
        **{f"single_blocks.{i}": (2, 309, 64) for i in range(spec.single_depth)},
    }
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract
    assert contract.check(received(contract)) == SIZES


def test_an_unknown_axis_is_refused(tiny_spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match="width"):
        Contract.of(tiny_spec, PRECISIONS["fp32"], {"width": Range(1, 1, 1)})


def test_clamp() -> None:
    assert [Range(2, 4, 8).clamp(size) for size in (1, 2, 5, 8, 9)] == [2, 2, 5, 8, 8]


def test_json_round_trip(tiny_spec: ModelSpec) -> None:
    contract = Contract.of(tiny_spec, PRECISIONS["bf16"], {"batch": Range(1, 1, 1)}, outputs=("blocks.0",))
    data = json.loads(json.dumps(contract.to_json()))
    assert Contract.from_json(data) == contract
    assert contract.max_side == data.pop("max_side") == tiny_spec.pos_max_size
    assert Contract.from_json(data).max_side is None  # of a bundle that does not say


def test_a_model_in_two_parts_has_the_contract_of_one(tiny_families: Mapping[str, ModelSpec]) -> None:
    """The parts' inputs are the model's, but for the table; the conditioning takes whole schedules."""
    whole = Contract.of(tiny_families["flux1"], PRECISIONS["bf16"], {"batch": Range(1, 2, 3)}, outputs=("blocks.0",))
    conditions = ("timestep", "pooled_projections", "guidance")
    parts = SplitContract.of(whole, conditions, 704, "bfloat16")
    assert tuple(t.name for t in parts.conditioning.inputs) == conditions
    assert parts.table == TensorSpec("modulation", ("batch", 704), "bfloat16")
    assert {*parts.conditioning.inputs, *parts.trunk.inputs} == {*whole.inputs, parts.table}
    assert (parts.trunk.outputs, parts.trunk.ranges, parts.trunk.profiles) == (
        whole.outputs, whole.ranges, whole.profiles
    )  # fmt: skip
    assert parts.conditioning.ranges == {"batch": Range(1, 2 * 28, 3 * 64)}
    assert SplitContract.from_json(json.loads(json.dumps(parts.to_json())), whole) == parts
    other = Contract.of(tiny_families["flux2"], PRECISIONS["bf16"])
    with pytest.raises(ValueError, match="not parts of the contract"):
        SplitContract.from_json(parts.to_json(), other)
