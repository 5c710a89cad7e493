"""Bytes that kernels move, and the roofline."""

from __future__ import annotations

import dataclasses

import pytest

from mmdit_deploy.build.gpus import GPU, GPUS, gpus_of
from mmdit_deploy.build.layers import EngineLayer, LayerTensor
from mmdit_deploy.build.traffic import Traffic, nbytes, roofline, traffic, traffic_by_call, traffic_of

# 10 bytes and 20 FLOPs a second
SLOW = GPU("slow", "8.9", 10e-9, 20e-12, "nowhere")


def tensor(elements: int | None, dtype: str = "Half", dims: tuple[int, ...] = (-1, 8)) -> LayerTensor:
    return LayerTensor("t", dims, dtype, elements)


def product(call: str = "a", flops: int | None = 320, dtype: str = "Half") -> EngineLayer:
    weights = (tensor(64, dtype, (8, 8)), tensor(1, "Float", (1,)))
    inputs, outputs = (tensor(80, dtype), tensor(10, "Float")), (tensor(80, dtype),)
    return EngineLayer("p", "gemm", 0, (("node", call),), inputs, outputs, "", weights, flops)


def test_a_kernel_moves_what_it_reads_and_writes() -> None:
    assert traffic(product()) == Traffic(read=200, weights=132, written=160, flops=320)
    assert traffic(product()).bytes == 492


@pytest.mark.parametrize(
    ("dtype", "elements", "expected"),
    [("Half", 3, 6), ("BFloat16", 3, 6), ("Float", 3, 12), ("Bool", 3, 3), ("FP8", 3, 3), ("FP4", 3, 2), ("Int4", 4, 2),
     ("Int64", 3, 24), ("Half", 0, 0), ("Half", None, None), ("Complex", 3, None)],
)  # fmt: skip
def test_bytes_of_a_tensor(dtype: str, elements: int | None, expected: int | None) -> None:
    assert nbytes(tensor(elements, dtype)) == expected


def test_what_is_not_known_is_counted_and_never_zero() -> None:
    known = product()
    for kernel, missing in (
        (dataclasses.replace(known, inputs=(tensor(None), tensor(10, "Float"))), Traffic(40, 132, 160, 320, 1)),
        (dataclasses.replace(known, outputs=(tensor(80, "Complex"),)), Traffic(200, 132, 0, 320, 1)),
        (dataclasses.replace(known, constants=None), Traffic(200, 0, 160, 320, 1)),
        (dataclasses.replace(known, flops=None), Traffic(200, 132, 160, 0, 1)),
    ):
        assert traffic(kernel) == missing
    assert traffic_of([dataclasses.replace(known, flops=None, constants=None), known]).unknown == 2


def test_kernels_of_a_call_move_their_sum() -> None:
    waiting = EngineLayer("w", "wait", 0, (("node", "a"),), (tensor(99),), (), "")
    layers = [product("a"), product("b"), waiting, product("a"), product("elsewhere")]
    one = traffic(product())
    assert traffic_by_call(layers, ["a", "b", "c"]) == {"a": one + one, "b": one, "engine": one}


def test_a_kernel_takes_as_long_as_its_bytes_or_its_flops() -> None:
    heavy = dataclasses.replace(product(), flops=2000)
    assert roofline([product()], SLOW) == pytest.approx(49.2)  # 16 s of FLOPs are hidden
    assert roofline([heavy], SLOW) == pytest.approx(100)
    assert roofline([product(), heavy], SLOW) == pytest.approx(149.2)  # one after another
    assert roofline([], SLOW) == 0


def test_there_is_no_estimate_of_products_of_another_type() -> None:
    """The rate is that of 16-bit factors."""
    assert roofline([product(dtype="BFloat16")], SLOW) is not None
    assert roofline([product(), product(dtype="Float")], SLOW) is None
    copy = dataclasses.replace(product(dtype="Float"), flops=0, type="kgen")
    assert roofline([copy], SLOW) is not None
    attention = EngineLayer("_gemm_mha_v2_myl0_1", "kgen", 0, (), (tensor(8),) * 3, (tensor(8),), "", (), 100)
    assert roofline([attention], SLOW) == pytest.approx(6.4)


def test_gpus_are_those_of_the_capabilities() -> None:
    assert [gpu.name for gpu in gpus_of(["8.9"])] == ["L4", "L40S", "RTX 4090"]
    assert [gpu.name for gpu in gpus_of(["8.6", "12.0"])] == ["A10", "RTX 3090", "RTX 5090"]
    assert gpus_of(["5.2"]) == ()
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        # FLOPs per byte at the ridge: a rate with sparsity, or one of fp16 sums, would be beyond
        assert gpu.source.startswith("NVIDIA") and 60 < gpu.flops_per_second / gpu.bytes_per_second < 450
