"""What every runtime does for an `Engine`, and which one does it for a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmdit_deploy.build import EngineRecord, Target
from mmdit_deploy.errors import UsageError
from mmdit_deploy.runtime.ort import OrtRunner
from mmdit_deploy.runtime.tensorrt import TensorRTEngine


class Runner(Protocol):
    """An engine that is loaded, on one device."""

    @property
    def device(self) -> torch.device:
        """Where its inputs and outputs are."""
        ...

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Run once, on torch's current stream of the device.

        Args:
            inputs: by name, of the contract's dtypes and shapes, on the device. They are never written to.
            outputs: contiguous tensors to write to, by name.
            sizes: of each symbolic axis.
        """
        ...

    def close(self) -> None:
        """Free what it holds. It cannot be run again."""
        ...


def open_runner(
    target: Target,
    files: Sequence[Path],
    record: EngineRecord | None = None,
    *,
    device: torch.device | None = None,
    cuda_graphs: bool = False,
    cache: Path | None = None,
    specialize: str = "lazy",
    in_turn: bool = False,
) -> Runner:
    """Load an engine.

    Args:
        files: the graph, for ONNX Runtime; the segments' engine files in order, for TensorRT.
        record: what was built, for TensorRT.
        device: of the target's kind; by default torch's current one.
        cuda_graphs, cache, specialize: of `TensorRTEngine`.
        in_turn: another engine's runs come between this one's, as those of a model's two parts do.

    Raises:
        UsageError: CUDA graphs of a target that has none.
        MissingPackageError: the runtime is not installed.
        MachineError: it cannot run here, or the engine does not load.
    """
    if record is not None:
        return TensorRTEngine(record, files, device, cuda_graphs=cuda_graphs, cache=cache, specialize=specialize)
    if cuda_graphs:
        raise UsageError(
            "CUDA graphs are for TensorRT targets", received=target.name, fix="drop it, or name a TensorRT target"
        )
    return OrtRunner(files[0], target, device, in_turn=in_turn)
