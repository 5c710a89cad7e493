"""The two TensorRTs: one API under two module names, and the differences between them as data."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from mmdit_deploy.errors import MissingPackageError


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's TensorRTs.

    Args:
        name: how people call it.
        module: what is imported.
        distributions: the packages that bring the module; the first that is installed says the version.
        install: the command that installs it.
        capabilities: compute capabilities that it builds for without a GPU, by target name (``sm89``) and as CUDA
            writes them; empty where it builds for this machine's GPU only.
        fused_attention: precisions that have a fused attention kernel. For the others attention is written out.
        layer_list: where a built engine's layer list is read: in the builder's ``log``, or from the engine by the
            ``inspector``, which deserializes it and so needs the GPU.
        timing_cache: whether measured kernel timings are kept between builds (ahead of time, nothing is timed).
        runtime_cache: whether kernels are compiled on first use, and kept by the runtime between processes.
        hardware_compatibility: name of the builder's ``HardwareCompatibilityLevel``, where it has a choice.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    install: str
    capabilities: Mapping[str, str]
    fused_attention: frozenset[str]
    layer_list: Literal["log", "inspector"]
    timing_cache: bool
    runtime_cache: bool
    hardware_compatibility: str | None

    def load(self, purpose: str) -> Any:
        """Import the module.

        Args:
            purpose: what needs it, for the message.

        Raises:
            MissingPackageError: it is not installed, or one of its libraries is missing.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            package = self.distributions[0]
            missing = getattr(error, "name", None) == self.module
            raise MissingPackageError(
                package, purpose=purpose, install=self.install, found=None if missing else str(error)
            ) from None

    def version(self) -> str | None:
        """The installed version, without importing it; None where it is not installed."""
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None


RTX = Flavour(
    name="TensorRT-RTX",
    module="tensorrt_rtx",
    distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    install="pip install 'mmdit-deploy[rtx]'",
    # trt.ComputeCapability of 1.7
    capabilities={"sm75": "7.5", "sm80": "8.0", "sm86": "8.6", "sm89": "8.9", "sm120": "12.0", "sm121": "12.1"},
    # An fp32 Attention "was not supported by a dedicated kernel" (1.7.1).
    fused_attention=frozenset({"fp16", "bf16"}),
    layer_list="log",
    timing_cache=False,
    runtime_cache=True,
    hardware_compatibility=None,
)
TENSORRT = Flavour(
    name="TensorRT",
    module="tensorrt",
    distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    install="pip install 'mmdit-deploy[trt]'",
    capabilities={},
    fused_attention=frozenset({"fp16", "bf16"}),
    layer_list="inspector",
    timing_cache=True,
    runtime_cache=False,
    hardware_compatibility="NONE",
)
