"""torch and numpy in, the same out: over the callers' own memory, which is never written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lent import Lent
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import ContractError
from mmdit_deploy.runtime import Engine, checks
from mmdit_deploy.runtime.checks import InputCheck
from mmdit_deploy.runtime.tensors import as_tensors, from_numpy, to_numpy
from random_inputs import random_inputs

SIZES = {"batch": 2, "img_tokens": 15, "txt_tokens": 4}


class Broken(Lent):
    """One that cannot lend it."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no memory to lend")


@pytest.fixture(scope="module")
def feed(engine: Engine) -> dict[str, Tensor]:
    return random_inputs(engine.contract, SIZES)


@pytest.fixture(scope="module")
def expected(engine: Engine, feed: dict[str, Tensor]) -> Tensor:
    return engine(feed)["sample"]


def test_a_given_array_whose_axis_runs_backwards_is_refused(engine: Engine, feed: dict[str, Tensor]) -> None:
    """Though numpy calls it contiguous, where the axis has one element."""
    one = {name: t[:1] if t.shape[0] == SIZES["batch"] else t for name, t in feed.items()}
    backwards = np.zeros(tuple(engine(one)["sample"].shape), np.float16)[::-1]
    assert backwards.flags.c_contiguous and backwards.flags.behaved
    with pytest.raises(ContractError) as caught:
        engine(one, outputs={"sample": backwards})
    assert "backwards" in str(caught.value.received)


def test_views_of_the_other_sign_are_read_as_they_are(
    engine: Engine, feed: dict[str, Tensor], expected: Tensor
) -> None:
    negated = torch.complex(torch.zeros_like(feed["timestep"]), -feed["timestep"]).conj().imag
    assert negated.is_neg() and torch.equal(negated, feed["timestep"])
    assert torch.equal(engine({**feed, "timestep": negated})["sample"], expected)
    out = torch._neg_view(torch.zeros_like(expected))
    with pytest.raises(ContractError) as caught:
        engine(feed, outputs={"sample": out})
    assert "negated" in str(caught.value.received)


def test_tensors_without_memory_are_refused(engine: Engine, feed: dict[str, Tensor], expected: Tensor) -> None:
    """Also where a call of these shapes went well before."""
    freed = feed["timestep"].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ContractError, match="timestep has memory"):
        engine({**feed, "timestep": freed})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Addresses that ONNX Runtime gets, by name; it runs nothing."""
    addresses: dict[str, int] = {}

    def run(session: Any, inputs: dict[str, Tensor], outputs: Any, into: dict[str, Tensor]) -> None:
        addresses.update({name: t.contiguous().data_ptr() for name, t in (*inputs.items(), *into.items())})

    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", run)
    return addresses


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_deploy.runtime.ort.run_session", lambda *_: pytest.fail("the runtime saw it"))


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def at_odd_address(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 1, np.uint8)
    odd = room[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    return odd


ARRAYS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda t: t.numpy(),
    "read-only numpy": lambda t: read_only(t.numpy()),
    "dlpack": lambda t: Lent(t.numpy()),
    "torch with gradients": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_gives_the_same_to_the_bit(
    engine: Engine, feed: dict[str, Tensor], expected: Tensor, kind: str
) -> None:
    out = engine({name: ARRAYS[kind](tensor) for name, tensor in feed.items()})["sample"]
    assert isinstance(out, np.ndarray if "numpy" in kind else Tensor)
    assert torch.equal(torch.as_tensor(out), expected)
    assert kind != "torch with gradients" or not out.requires_grad


@pytest.mark.parametrize("kind", ARRAYS)
def test_the_runtime_gets_the_callers_own_memory(
    engine: Engine, feed: dict[str, Tensor], seen: dict[str, int], kind: str
) -> None:
    given = {name: ARRAYS[kind](tensor) for name, tensor in feed.items()}
    tensors = as_tensors({n: a.array if isinstance(a, Lent) else a for n, a in given.items()})[0]
    out = engine(given)["sample"]
    address = out.ctypes.data if isinstance(out, np.ndarray) else out.data_ptr()
    assert seen == {**{name: t.data_ptr() for name, t in tensors.items()}, "sample": address}
    for name, array in given.items():
        if isinstance(array, np.ndarray):
            assert seen[name] == array.ctypes.data


def test_one_tensor_of_torch_makes_the_output_torchs(engine: Engine, feed: dict[str, Tensor], expected: Tensor) -> None:
    mixed = {name: t if name == "timestep" else t.numpy() for name, t in feed.items()}
    assert torch.equal(engine(mixed)["sample"], expected)


@pytest.mark.parametrize(
    "strided",
    [
        lambda a: np.stack([a, a], -1)[..., 0],
        lambda a: a[::-1].copy()[::-1],
        at_odd_address,
        lambda a: np.asfortranarray(a),
    ],
    ids=["every second", "backwards", "odd address", "column-major"],
)
def test_what_lies_otherwise_is_copied(
    engine: Engine, feed: dict[str, Tensor], expected: Tensor, strided: Callable[[np.ndarray], np.ndarray]
) -> None:
    arrays = {name: strided(tensor.numpy()) for name, tensor in feed.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    assert np.array_equal(engine(arrays)["sample"], expected.numpy())
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())


@pytest.mark.parametrize("writeable", [True, False])
def test_bf16_is_ml_dtypes(writeable: bool) -> None:
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    array.flags.writeable = writeable
    tensor = from_numpy("x", array)
    assert tensor.dtype == torch.bfloat16 and tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    back = to_numpy(tensor)
    assert back.dtype == ml_dtypes.bfloat16 and np.array_equal(back, array)
    assert tensor.data_ptr() == array.ctypes.data == back.ctypes.data


def test_outputs_may_be_numpy(engine: Engine, feed: dict[str, Tensor], expected: Tensor) -> None:
    mine = np.zeros(expected.shape, np.float16)
    for arrays in (feed, {name: t.numpy() for name, t in feed.items()}):
        mine[...] = 0
        assert engine(arrays, outputs={"sample": mine})["sample"] is mine
        assert np.array_equal(mine, expected.numpy())


def test_outputs_may_be_torch_for_inputs_of_numpy(engine: Engine, feed: dict[str, Tensor], expected: Tensor) -> None:
    mine = torch.zeros_like(expected)
    assert engine({n: t.numpy() for n, t in feed.items()}, outputs={"sample": mine})["sample"] is mine
    assert torch.equal(mine, expected)


WRONG_INPUTS: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "a list": (lambda t: t.tolist(), "timestep is a torch tensor, a numpy array", "list"),
    "a number": (lambda t: 3.0, "timestep is a torch tensor, a numpy array", "float"),
    "a foreign byte order": (lambda t: t.numpy().astype(">f4"), "of a type that torch has", ">f4"),
    "objects": (lambda t: t.numpy().astype(object), "of a type that torch has", "a numpy array of object"),
    "what lends nothing": (lambda t: Broken(t.numpy()), "of a type that torch has", "no memory to lend"),
    "doubles": (lambda t: t.numpy().astype(np.float64), "timestep is float32", "float64"),
    "lent doubles": (lambda t: Lent(t.numpy().astype(np.float64)), "timestep is float32", "float64"),
    "nothing": (lambda t: t.numpy()[:0], "batch is one size in all tensors", "2 in hidden_states, 0 in timestep"),
    "a sparse tensor": (lambda t: t.to_sparse(), "timestep is dense", "torch.sparse_coo"),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_a_wrong_array_never_reaches_the_runtime(engine: Engine, feed: dict[str, Tensor], name: str) -> None:
    broken, rule, received = WRONG_INPUTS[name]
    with pytest.raises(ContractError) as caught:
        engine({**feed, "timestep": broken(feed["timestep"])})
    assert rule in caught.value.rule and received in str(caught.value.received) and caught.value.fix


@pytest.mark.usefixtures("unseen")
def test_no_samples_at_all(engine: Engine, feed: dict[str, Tensor]) -> None:
    none = {
        t.name: torch.zeros(t.shape({**SIZES, "batch": 0}), dtype=feed[t.name].dtype) for t in engine.contract.inputs
    }
    with pytest.raises(ContractError, match="pass at least one"):
        engine(none)


WRONG_OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "read-only": (lambda t: read_only(t.numpy()), "float16 [2, 15, 12], read-only or not aligned"),
    "odd address": (lambda t: at_odd_address(t.numpy()), "float16 [2, 15, 12], read-only or not aligned"),
    "column-major": (lambda t: np.asfortranarray(t.numpy()), "float16 [2, 15, 12], not contiguous"),
    "fp32": (lambda t: t.numpy().astype(np.float32), "float32 [2, 15, 12]"),
    "another shape": (lambda t: t.numpy()[:1].copy(), "float16 [1, 15, 12]"),
    "with gradients": (lambda t: t.clone().requires_grad_(), "float16 [2, 15, 12], with gradients"),
    "sparse": (lambda t: t.to_sparse(), "float16 [2, 15, 12], not contiguous"),
    "lent": (lambda t: Lent(t.numpy()), "Lent"),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_an_output_that_cannot_be_written_to_never_reaches_the_runtime(
    engine: Engine, feed: dict[str, Tensor], name: str
) -> None:
    change, received = WRONG_OUTPUTS[name]
    with pytest.raises(ContractError) as caught:
        engine(feed, outputs={"sample": change(torch.zeros(2, 15, 12, dtype=torch.float16))})
    assert caught.value.received == received and "sample" in caught.value.rule and caught.value.fix


def overlapping(name: str) -> tuple[Tensor, Tensor]:
    """Latents [2, 15, 16] and an output [2, 15, 12] over the same memory, both fp16."""
    room = torch.zeros(2, 2, 15, 16, dtype=torch.float16)
    flat = room.flatten()
    return {
        "the same start": (room[0], flat[:360].view(2, 15, 12)),
        "the last element": (room[0], flat[479 : 479 + 360].view(2, 15, 12)),
        "a strided input": (room[:, 1], flat[360:720].view(2, 15, 12)),
        "a backwards input": (room[0], flat[100:460].view(2, 15, 12)),
    }[name]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("name", ["the same start", "the last element", "a strided input", "a backwards input"])
def test_an_output_over_an_input_is_refused(engine: Engine, feed: dict[str, Tensor], name: str, numpy: bool) -> None:
    latent, output = overlapping(name)
    arrays: Any = {**feed, "hidden_states": latent}
    outputs: Any = {"sample": output}
    if numpy:
        arrays, outputs = {n: t.numpy() for n, t in arrays.items()}, {"sample": output.numpy()}
        if name == "a backwards input":
            arrays["hidden_states"] = arrays["hidden_states"][::-1]
    with pytest.raises(ContractError) as caught:
        engine(arrays, outputs=outputs)
    assert caught.value.received == "the output sample overlaps the input hidden_states"
    assert "never written to" in caught.value.rule


def test_an_output_beside_an_input_is_not(engine: Engine, feed: dict[str, Tensor], expected: Tensor) -> None:
    room = torch.zeros(480 + 360, dtype=torch.float16)
    latent, output = room[:480].view(2, 15, 16), room[480:].view(2, 15, 12)
    latent.copy_(feed["hidden_states"])
    engine({**feed, "hidden_states": latent}, outputs={"sample": output})
    assert torch.equal(output, expected) and torch.equal(latent, feed["hidden_states"])


def test_the_cpu_may_be_called_by_its_number(tiny_bundle: Path, feed: dict[str, Tensor], expected: Tensor) -> None:
    with Engine.load(tiny_bundle, device="cpu:0") as engine:
        assert torch.equal(engine(feed)["sample"], expected)


def test_what_was_in_order_once_says_nothing_of_other_tensors(
    engine: Engine, feed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes that are known are not checked again; only so many are kept, and a wrong one never is."""
    checked: list[object] = []

    class Counted(Contract):
        def check(self, received: Any) -> dict[str, int]:
            checked.append(received)
            return super().check(received)

    whole = engine.contract
    contract = Counted(whole.inputs, whole.outputs, whole.ranges)
    check = InputCheck(contract, engine.device, engine.target)
    for _ in range(3):
        assert check(feed) == SIZES
    assert len(checked) == 1
    for _ in range(2):
        with pytest.raises(ContractError, match="timestep is float32"):
            check({**feed, "timestep": feed["timestep"].double()})
    assert len(checked) == 3
    monkeypatch.setattr(checks, "KEPT", 2)
    for batch in (1, 2, 3, 2, 1):
        sizes = {**SIZES, "batch": batch}
        assert check({t.name: torch.zeros(t.shape(sizes), dtype=feed[t.name].dtype) for t in whole.inputs}) == sizes
    assert len(check._known) <= 2
