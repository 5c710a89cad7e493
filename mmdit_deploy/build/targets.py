"""What can be built: the targets, and the dialect that each one runs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmdit_deploy.errors import MachineError, UsageError
from mmdit_deploy.spec import Precision

_TENSORRT = re.compile(r"trt|rtx:sm\d+(\+sm\d+)*")
ORT_TARGETS = ("ort-cpu", "ort-cuda")


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """The targets to build, without repeats.

    Raises:
        UsageError: a name is no target, or there is none.
        MachineError: a TensorRT target, which this version does not build.
    """
    if not names:
        raise UsageError("a bundle has at least one target", received="none", fix="--target ort-cpu")
    for name in names:
        if _TENSORRT.fullmatch(name):
            raise MachineError(
                "this version builds engines for ONNX Runtime",
                received=name,
                fix=f"--target {' or '.join(ORT_TARGETS)}; model.onnx in the bundle is the graph for TensorRT",
            )
        if name not in ORT_TARGETS:
            raise UsageError(
                f"a target is one of {', '.join(ORT_TARGETS)}", received=repr(name), fix="--target ort-cpu"
            )
    return tuple(dict.fromkeys(names))


def dialect_of(target: str, precision: Precision) -> str:
    """The graph dialect that a target runs at a precision."""
    # ONNX Runtime has no bf16 kernels on CPU, so bf16 is emulated there, and reports call it so.
    return "ort-emulated-bf16" if (target, precision.name) == ("ort-cpu", "bf16") else "ort"


def execution_of(target: str, precision: Precision) -> str:
    """How a target computes at a precision, in words for the report."""
    if target == "ort-cpu":
        return {
            "fp32": "ONNX Runtime on CPU, fp32 kernels",
            "fp16": "ONNX Runtime on CPU, fp16 through casts around fp32 kernels",
            "bf16": "ONNX Runtime on CPU, bf16 emulated: fp32 kernels, each result rounded through bf16",
        }[precision.name]
    return f"ONNX Runtime on CUDA, {precision.name} kernels"
