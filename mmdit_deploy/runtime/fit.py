"""Whether a TensorRT engine fits this machine, found out before any of it is deserialized: it is executable code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmdit_deploy.build import EngineRecord, Target
from mmdit_deploy.build.flavours import Flavour
from mmdit_deploy.errors import MachineError

EXPORT_FOR_CPU = "mmdit-export … --target ort-cpu"
_OR = "; or: "


def gpu(device: torch.device | None) -> torch.device:
    """The device with its index: torch's current GPU where none is given, or one without an index."""
    if device is not None and device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def either(*remedies: str) -> str:
    """An error's fix of which one will do, each said once; a remedy may be such a fix itself."""
    return _OR.join(dict.fromkeys(part for remedy in remedies for part in remedy.split(_OR)))


def check_gpu(rule: str) -> None:
    """Check that there is a GPU at all.

    Args:
        rule: of the error.

    Raises:
        MachineError: torch finds none.
    """
    if not torch.cuda.is_available():
        raise MachineError(
            rule,
            received="torch finds no GPU" if torch.version.cuda else f"torch {torch.__version__}, which has no CUDA",
            fix=either("run it on a machine with such a GPU, and a torch with CUDA", EXPORT_FOR_CPU),
        )


def check_runs_here(record: EngineRecord, target: Target, device: torch.device | None = None) -> None:
    """Check that this machine has the GPU and the very version that an engine was built for.

    Engines run in no other version: TensorRT-RTX's never, TensorRT's only where built to, at a cost
    (NVIDIA, "Engine Compatibility").

    Args:
        device: the GPU; by default torch's current one.

    Raises:
        MissingPackageError: TensorRT is not installed.
        MachineError: there is no GPU, or the engine fits neither it nor the installed version; with the command that
            builds one that does.
    """
    flavour = _flavour(target)
    needed = ", ".join(record.capabilities)
    check_gpu(f"the engine {target.name} needs an NVIDIA GPU of compute capability {needed}")
    capability = _capability(gpu(device))
    installed = flavour.version() or str(flavour.load(f"the target {target.name}").__version__)
    if capability not in record.capabilities:
        raise MachineError(
            f"the engine {target.name} runs on compute capability {needed}",
            received=f"{torch.cuda.get_device_name(gpu(device))}, which has {capability}",
            fix=rebuild_command(flavour, gpu(device)),
        )
    if _release(installed) != _release(record.version):
        raise MachineError(
            f"the engine {target.name} runs in {flavour.name} {record.version}, which built it, and in no other",
            received=f"{flavour.name} {installed}",
            fix=either(
                f"{rebuild_command(flavour, gpu(device))} --force builds it again for this version",
                f"install the one that built it: pip install {flavour.distributions[0]}=={record.version}",
            ),
        )


def rebuild_command(flavour: Flavour, device: torch.device) -> str:
    """The command that builds an engine for a GPU: this flavour's where it builds for it, else TensorRT's."""
    names = {number: name for name, number in flavour.capabilities.items()}
    capability = _capability(device)
    return f"mmdit-export … --target {f'rtx:{names[capability]}' if capability in names else 'trt'}"


def check_header(trt: Any, runtime: Any, file: Path, target: Target, fix: str) -> None:
    """Ask the runtime itself whether it takes an engine; it looks at the first bytes only.

    TensorRT-RTX alone can be asked (since 1.1). Its no is final, its yes is likely.

    Args:
        trt: the module.
        runtime: its `Runtime`.
        fix: the command that builds the engine again.

    Raises:
        MachineError: it does not; says why.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    with file.open("rb") as stream:
        header = stream.read(runtime.engine_header_size)
    validity, diagnosis = runtime.get_engine_validity(header)
    causes = [cause for cause in trt.EngineInvalidityDiagnostics.__members__.values() if diagnosis & int(cause.value)]
    # An INVALID without a cause comes where the GPU could not be asked; loading it then says more.
    if validity == trt.EngineValidity.INVALID and causes:
        remedies = [_REMEDIES[cause.name] for cause in causes if cause.name in _REMEDIES]
        raise MachineError(
            f"the engine {target.name} is one that {_flavour(target).name} {trt.__version__} takes on this machine",
            received=f"{file.name}: {', '.join(cause.name.lower().replace('_', ' ') for cause in causes)}",
            fix="; ".join(remedies or [fix]),  # all of them
        )


# Of EngineInvalidityDiagnostics; for the others the engine is built again.
_REMEDIES = {
    "CUDA_ERROR": "check the GPU and its driver (nvidia-smi); the engine may be right",
    "OLD_CUDA_DRIVER": "update the NVIDIA driver",
    "INSUFFICIENT_GPU_MEMORY": "free memory of the GPU, or use a larger one",
}


def _flavour(target: Target) -> Flavour:
    assert target.flavour is not None, f"{target.name} is no TensorRT target"
    return target.flavour


def _capability(device: torch.device) -> str:
    """As CUDA writes it, e.g. ``8.9``."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _release(version: str) -> str:
    """The version of the library in a package's: ``10.14.1.48.post1`` holds TensorRT 10.14.1.48."""
    return version.split("+")[0].split(".post")[0]
