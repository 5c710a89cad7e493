"""Any bytes at all: a file is read, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.checks.onnx_checker import check_with_onnx
from mmdit_deploy.graph.checks.well_formed import check_well_formed
from mmdit_deploy.graph.onnx_file import read_onnx, to_ir

# GELU, a call of a function, and a branch: about what files are made of.
TEXTS = {
    "gelu": """
        <ir_version: 10, opset_import: ["": 17]>
        gelu (float[batch, 4] x) => (float[batch, 4] y)
        <float[1] root = {1.41421354}> {
            half = Constant <value_float = 0.5> ()
            a = Div(x, root)
            b = Erf(a)
            one = Constant <value = float {1.0}> ()
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
    "call": """
        <ir_version: 10, opset_import: ["": 21, "mine": 1]>
        call (float[batch, 4] x) => (float[batch, 4] y) { y = mine.twice <n = 2> (x) }
        <domain: "mine", opset_import: ["": 21]>
        twice <n> (a) => (b) { c = Relu(a)
            b = Softmax <axis: int = @n> (c) }""",
    "branch": """
        <ir_version: 10, opset_import: ["": 21]>
        branch (float[batch, 4] x, bool p) => (float[batch, 4] y) {
            y = If (p) <
                then_branch = one () => (float[batch, 4] u) { u = Relu(x) },
                else_branch = other () => (float[batch, 4] v) { v = Cast <to = 1> (x) }
            >
        }""",
}
SEEDS = {name: onnx.parser.parse_model(text).SerializeToString() for name, text in TEXTS.items()}


def is_read(content: bytes, folder: Path) -> bool:
    """Whether a file is read, and not refused; anything else that happens is a failure."""
    path = folder / "in.onnx"
    path.write_bytes(content)
    try:
        model = read_onnx(path)
        check_well_formed(model, folder)
        check_with_onnx(model)
        to_ir(model, folder)
    except UsageError as error:
        assert error.received and error.fix
        return False
    return True


def test_the_seeds_are_read(tmp_path: Path) -> None:
    assert all(is_read(content, tmp_path) for content in SEEDS.values())


_settings = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_seeds = st.sampled_from(sorted(SEEDS))


@_settings
@given(seed=_seeds, changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=6))
def test_bytes_that_were_changed(seed: str, changes: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(SEEDS[seed])
    for at, value in changes:
        content[at % len(content)] = value
    is_read(bytes(content), tmp_path)


@_settings
@given(seed=_seeds, at=st.integers(0, 10**4), gone=st.integers(0, 40), put=st.binary(max_size=20))
def test_bytes_that_were_cut_out_and_put_in(seed: str, at: int, gone: int, put: bytes, tmp_path: Path) -> None:
    content = SEEDS[seed]
    at %= len(content)
    is_read(content[:at] + put + content[at + gone :], tmp_path)


@_settings
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    is_read(content, tmp_path)


@_settings
@given(
    seed=_seeds,
    number=st.integers(min_value=-(2**63), max_value=2**63 - 1),
    where=st.sampled_from(["ir", "opset", "dim", "type", "attribute"]),
)
def test_numbers_that_were_changed(seed: str, number: int, where: str, tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(SEEDS[seed])
    if where == "ir":
        model.ir_version = number
    elif where == "opset":
        model.opset_import[0].version = number
    elif where == "dim":
        model.graph.initializer.add(name="new", data_type=1).dims.append(number)
    elif where == "type":
        model.graph.input[0].type.tensor_type.elem_type = number % 2**31
    else:
        model.graph.node[0].attribute.add(name="axis", type=onnx.AttributeProto.INT, i=number)
    if is_read(model.SerializeToString(), tmp_path) and where in ("ir", "opset", "type"):
        assert 0 < number % 2**31 < 100


@pytest.mark.parametrize("seed", ["gelu", "branch"])
def test_cut_at_any_byte(seed: str, tmp_path: Path) -> None:
    content = SEEDS[seed]
    assert not any(is_read(content[:size], tmp_path) for size in range(len(content)))
