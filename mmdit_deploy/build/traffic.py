"""The bytes that kernels move, and the time that moving and multiplying take at least on a GPU: an estimate.

    kernel: reads [8192, 1536] fp16 and a weight [1536, 4608], writes [8192, 4608]   ⇒   25.2 MB + 14.2 MB, 75.5 MB

Counted is what a kernel takes from memory and puts there, each tensor once: what it reads again comes out of a cache.
Whether the next kernel finds a tensor in the L2 cache is not modelled. How elements are known: `build/opt_sizes.py`.
What is not known is counted in `unknown`, and the bytes are then those of the rest: at least so many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmdit_deploy.build.gpus import GPU
from mmdit_deploy.build.layers import EngineLayer, LayerTensor, by_call

# Bits of TensorRT's words for types, in the builder's log and in the inspector's JSON.
_BITS = {
    **{"Bool": 8, "BFloat16": 16, "BF16": 16, "Double": 64, "E4M3": 8, "E8M0": 8, "FP4": 4, "FP4E2M1": 4, "FP8": 8},
    **{"Float": 32, "Half": 16, "Int32": 32, "Int4": 4, "Int64": 64, "Int8": 8, "UInt8": 8},
}
_HALVES = frozenset({"Half", "BFloat16", "BF16"})


@dataclass(frozen=True)
class Traffic:
    """What one kernel moves, or several.

    Args:
        read: bytes of activations.
        weights: bytes of constants.
        written: bytes.
        flops: of matrix products; a multiply-add is two.
        unknown: tensors and products whose size is not known: they are in none of these.
    """

    read: int = 0
    weights: int = 0
    written: int = 0
    flops: int = 0
    unknown: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.weights + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read + other.read,
            self.weights + other.weights,
            self.written + other.written,
            self.flops + other.flops,
            self.unknown + other.unknown,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "weights": self.weights,
            "written": self.written,
            "bytes": self.bytes,
            "flops": self.flops,
            "unknown": self.unknown,
        }


def traffic(kernel: EngineLayer) -> Traffic:
    """What a kernel of `opt_sizes.at_opt` moves, at the opt shape of its profile."""
    (read, a), (weights, b), (written, c) = map(_moved, (kernel.inputs, kernel.constants, kernel.outputs))
    return Traffic(read, weights, written, kernel.flops or 0, a + b + c + (kernel.flops is None))


def traffic_of(kernels: Iterable[EngineLayer]) -> Traffic:
    """What kernels move together."""
    return sum((traffic(kernel) for kernel in kernels), Traffic())


def traffic_by_call(layers: Iterable[EngineLayer], calls: Sequence[str]) -> dict[str, Traffic]:
    """What the kernels of each call move, and under ``engine`` those of none; of several profiles, those of all."""
    return {call: traffic_of(kernels) for call, kernels in by_call(layers, calls).items()}


def roofline(kernels: Iterable[EngineLayer], gpu: GPU) -> float | None:
    """Seconds that kernels take at least, one after another: each as long as its bytes or its FLOPs take, the longer.

    An estimate by the published figures of the GPU, not measured: no kernel reaches them.

    Returns:
        None where a product is of a type that the GPU's rate is not for; of what is `unknown` nothing is in it.
    """
    seconds = 0.0
    for kernel in kernels:
        moved = traffic(kernel)
        if moved.flops and not _is_half(kernel):
            return None
        seconds += max(moved.bytes / gpu.bytes_per_second, moved.flops / gpu.flops_per_second)
    return seconds


def nbytes(tensor: LayerTensor) -> int | None:
    """Bytes of what a kernel reads or writes of a tensor; None where its size or its type is not known."""
    bits = _BITS.get(tensor.dtype)
    return None if bits is None or tensor.elements is None else (tensor.elements * bits + 7) // 8


def _moved(tensors: Sequence[LayerTensor] | None) -> tuple[int, int]:
    """Bytes, and how many tensors are not among them."""
    if tensors is None:
        return 0, 1  # a list that does not say them
    sizes = [nbytes(tensor) for tensor in tensors]
    return sum(size for size in sizes if size is not None), sizes.count(None)


def _is_half(kernel: EngineLayer) -> bool:
    """Whether a product's factors are 16-bit: its weights, where it has some; biases and scales are none."""
    weights = [t for t in kernel.constants or () if len(t.dims) > 1 and 1 not in t.dims]
    factors = weights or kernel.inputs
    return bool(factors) and all(tensor.dtype in _HALVES for tensor in factors)
