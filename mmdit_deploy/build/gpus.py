"""GPUs by what NVIDIA publishes of them: data for estimates."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Args:
        capability: compute capability, as CUDA writes it.
        bandwidth: of its memory, in GB/s.
        tflops: dense, of fp16 products that are summed up in fp32.
        source: where NVIDIA says so.
    """

    name: str
    capability: str
    bandwidth: float
    tflops: float
    source: str

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth * 1e9

    @property
    def flops_per_second(self) -> float:
        return self.tflops * 1e12


_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, table 9"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"

# Datasheets that give rates with sparsity only say that they are double the dense ones.
GPUS = (
    GPU("T4", "7.5", 320, 65, "NVIDIA T4 datasheet"),
    GPU("A100 SXM 80GB", "8.0", 2039, 312, "NVIDIA A100 datasheet"),
    GPU("A10", "8.6", 600, 125, "NVIDIA A10 datasheet"),
    GPU("RTX 3090", "8.6", 936, 71, _AMPERE),
    GPU("L4", "8.9", 300, 121, "NVIDIA L4 datasheet: 242 with sparsity"),
    GPU("L40S", "8.9", 864, 362.05, "NVIDIA L40S datasheet"),
    GPU("RTX 4090", "8.9", 1008, 165.2, _ADA),
    GPU("H100 SXM", "9.0", 3350, 989.4, "NVIDIA H100 Tensor Core GPU Architecture whitepaper; datasheet"),
    GPU("H200", "9.0", 4800, 989.4, "NVIDIA H200 datasheet: 1,979 with sparsity"),
    GPU("RTX 5090", "12.0", 1792, 209.5, _BLACKWELL),
)


def gpus_of(capabilities: Collection[str]) -> tuple[GPU, ...]:
    """Those that have one of the compute capabilities."""
    return tuple(gpu for gpu in GPUS if gpu.capability in capabilities)
