"""What can be built: the targets, and the dialect of the graph that each one runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmdit_deploy.build.flavours import RTX, TENSORRT, Flavour
from mmdit_deploy.errors import UsageError
from mmdit_deploy.spec import Precision

_RTX = re.compile(r"rtx:(sm\d+(?:\+sm\d+)*)")
_FORMS = "ort-cpu, ort-cuda, rtx:sm89 (or rtx:sm86+sm89: one file for several), trt"


@dataclass(frozen=True)
class Target:
    """One runtime, on one kind of device.

    Args:
        name: as on the command line, e.g. ``rtx:sm86+sm89``.
        device: of torch, where the engine's inputs are: ``cpu`` or ``cuda``.
        provider: ONNX Runtime's execution provider; None for TensorRT.
        flavour: which TensorRT; None for ONNX Runtime.
        capabilities: compute capabilities named in the target, e.g. ``("sm86", "sm89")``; empty for this GPU's.
    """

    name: str
    device: str
    provider: str | None = None
    flavour: Flavour | None = None
    capabilities: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Where its engine files lie in a bundle: ``engines/rtx-sm86+sm89``."""
        return f"engines/{self.name.replace(':', '-')}"


_FIXED = {
    "ort-cpu": Target("ort-cpu", "cpu", provider="CPUExecutionProvider"),
    "ort-cuda": Target("ort-cuda", "cuda", provider="CUDAExecutionProvider"),
    "trt": Target("trt", "cuda", flavour=TENSORRT),
}


def parse_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: it is none, or TensorRT-RTX does not build for a compute capability that it names.
    """
    if name in _FIXED:
        return _FIXED[name]
    match = _RTX.fullmatch(name)
    if match is None:
        raise UsageError(f"a target is one of {_FORMS}", received=repr(name), fix="e.g. --target rtx:sm89")
    named = match[1].split("+")
    unknown = [sm for sm in named if sm not in RTX.capabilities]
    if unknown:
        raise UsageError(
            f"{RTX.name} builds for {', '.join(RTX.capabilities)}",
            received=", ".join(unknown),
            fix="--target trt, on a machine with that GPU"
            if set(unknown) & {"sm90", "sm100", "sm103"}
            else "--target rtx:sm89, or another of these",
        )
    # One engine, one name: in the order of the table, each once.
    ordered = tuple(sm for sm in RTX.capabilities if sm in named)
    return Target("rtx:" + "+".join(ordered), "cuda", flavour=RTX, capabilities=ordered)


def check_targets(names: Sequence[str], precision: Precision) -> tuple[Target, ...]:
    """The targets to build, without repeats.

    Raises:
        UsageError: a name is no target, there is none, or a named GPU lacks the precision.
    """
    if not names:
        raise UsageError("a bundle has at least one target", received="none", fix="--target ort-cpu")
    targets = tuple({target.name: target for target in map(parse_target, names)}.values())
    for target in targets:
        # bf16 came with Ampere; TensorRT-RTX: "the model contains HW-specific datatypes: b16".
        if precision.name == "bf16" and "sm75" in target.capabilities:
            raise UsageError(
                "bf16 needs a GPU of compute capability sm80 or later", received=target.name, fix="--fp16, or drop sm75"
            )
    return targets


def dialect_of(target: Target, precision: Precision) -> str:
    """The graph dialect that a target runs at a precision."""
    if target.flavour is not None:
        return "trt"
    # ONNX Runtime has no bf16 kernels on CPU, so bf16 is emulated there, and reports call it so.
    return "ort-emulated-bf16" if (target.name, precision.name) == ("ort-cpu", "bf16") else "ort"


def stepped_dialect_of(target: Target, precision: Precision) -> str:
    """The dialect that verification steps through, call by call, on ONNX Runtime.

    Of a TensorRT target it is the standard graph, on the CPU: an engine cannot be stepped through.
    """
    if target.flavour is None:
        return dialect_of(target, precision)
    return "standard-emulated-bf16" if precision.name == "bf16" else "standard"


def execution_of(target: Target, precision: Precision) -> str:
    """How a target computes at a precision, in words for the report."""
    if target.flavour is not None:
        attention = "fused" if precision.name in target.flavour.fused_attention else "written out"
        return f"{target.flavour.name}, {precision.name} kernels, {attention} attention"
    if target.name == "ort-cpu":
        return {
            "fp32": "ONNX Runtime on CPU, fp32 kernels",
            "fp16": "ONNX Runtime on CPU, fp16 through casts around fp32 kernels",
            "bf16": "ONNX Runtime on CPU, bf16 emulated: fp32 kernels, each result rounded through bf16",
        }[precision.name]
    return f"ONNX Runtime on CUDA, {precision.name} kernels"
