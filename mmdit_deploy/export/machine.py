"""What this machine can build and run."""

from __future__ import annotations

import torch

from mmdit_deploy.build import RTX, TENSORRT, Target, parse_target
from mmdit_deploy.errors import MachineError, MissingPackageError
from mmdit_deploy.runtime.ort import check_provider, import_onnxruntime
from mmdit_deploy.spec import Precision


def default_targets(precision: Precision | None = None) -> tuple[str, ...]:
    """The engines to build where none is named.

    Without a GPU ``ort-cpu``, and ``rtx:sm89`` ahead of time (``rtx:sm120``, which has FP4, for that); with one,
    ``ort-cuda`` and the TensorRT that fits it. What is not installed is left out.
    """
    names: list[str] = []
    if torch.cuda.is_available():
        if _runs("CUDAExecutionProvider"):
            names.append("ort-cuda")
        sm = "sm{}{}".format(*torch.cuda.get_device_capability())
        if sm in RTX.capabilities and RTX.installed:
            names.append(f"rtx:{sm}")
        elif TENSORRT.installed:
            names.append("trt")
    else:
        ahead = "rtx:sm120" if precision is not None and precision.name == "fp4" else "rtx:sm89"
        names += ["ort-cpu", ahead] if RTX.installed else ["ort-cpu"]
    return tuple(names or ["ort-cpu"])


def _runs(provider: str) -> bool:
    try:
        return provider in import_onnxruntime("ort-cuda").get_available_providers()
    except MissingPackageError:
        return False


def check_builds_here(target: Target) -> None:
    """Say what is missing before gigabytes are written, not after.

    Raises:
        MissingPackageError: the target's TensorRT is not installed.
        MachineError: it is built on the machine that runs it, and this one has no GPU.
    """
    if target.flavour is None:
        return
    target.flavour.load(f"the target {target.name}")
    if not target.capabilities and not torch.cuda.is_available():
        raise MachineError(
            f"the target {target.name} is built on a machine with the GPU that will run it",
            received="torch finds no GPU here",
            fix="--target rtx:sm89 (or another compute capability) builds ahead of time",
        )


def check_verifies_here(target: Target) -> None:
    """Verification runs an ONNX Runtime target's engine, and of a TensorRT target at least the graph on the CPU.

    Raises:
        MachineError: ONNX Runtime is not installed, lacks the provider, or there is no GPU.
    """
    try:
        check_provider(target if target.provider else parse_target("ort-cpu"))
    except MachineError as error:
        what = "its engine" if target.provider else "model.onnx, which its engines are built from,"
        raise MachineError(
            f"verifying {target.name} runs {what} on ONNX Runtime: {error.rule}",
            received=error.received,
            fix=f"{error.fix}; or --no-verify writes the bundle unproven",
        ) from None
