"""The two TensorRTs: one API under two module names, and the differences between them as data."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from mmdit_deploy.errors import MachineError, MissingPackageError


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's TensorRTs.

    Args:
        name: how people call it.
        module: what is imported.
        distributions: the packages that bring the module; the first that is installed says the version.
        minimum: the first version that will do.
        install: the command that installs one that will.
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
    minimum: str
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
            MachineError: it is older than the first that will do.
        """
        try:
            module = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            package = self.distributions[0]
            missing = getattr(error, "name", None) == self.module
            raise MissingPackageError(
                package, purpose=purpose, install=self.install, found=None if missing else str(error)
            ) from None
        version = getattr(module, "__version__", None) or self.version()
        if version is not None and not self._will_do(version):
            raise MachineError(
                f"{purpose} needs {self.name} {self.minimum} or later",
                received=f"{self.name} {version}",
                fix=self.install,
            )
        return module

    def version(self) -> str | None:
        """The installed version, without importing it; None where it is not installed."""
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    @property
    def installed(self) -> bool:
        """Whether a version that will do is installed; nothing is imported."""
        version = self.version()
        return version is not None and self._will_do(version)

    def _will_do(self, version: str) -> bool:
        return _numbers(version) >= _numbers(self.minimum)


def _numbers(version: str) -> tuple[int, ...]:
    """``10.15.1.29.post1`` as (10, 15, 1, 29)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


RTX = Flavour(
    name="TensorRT-RTX",
    module="tensorrt_rtx",
    distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    minimum="1.7",
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
    minimum="10.15",  # the first whose parser has RMSNormalization
    install="pip install 'mmdit-deploy[trt]'",
    capabilities={},
    fused_attention=frozenset({"fp16", "bf16"}),
    layer_list="inspector",
    timing_cache=True,
    runtime_cache=False,
    hardware_compatibility="NONE",
)
