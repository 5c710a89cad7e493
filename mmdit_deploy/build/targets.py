"""What can be built: the targets, and the dialect of the graph that each one runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmdit_deploy.build.flavours import RTX, TENSORRT, Flavour
from mmdit_deploy.build.formats import check_formats, formats_of
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import Scheme
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


def check_targets(names: Sequence[str], precision: Precision, schemes: Collection[Scheme] = ()) -> tuple[Target, ...]:
    """The targets to build, without repeats.

    Args:
        schemes: that linear layers are quantized by, besides those of the precision's own name.

    Raises:
        UsageError: a name is no target, there is none, or a GPU of one lacks a format of the precision: one that it
            names, or for ``trt`` this machine's, where torch sees it.
    """
    if not names:
        raise UsageError("a bundle has at least one target", received="none", fix="--target ort-cpu")
    targets = tuple({target.name: target for target in map(parse_target, names)}.values())
    formats = formats_of(precision, schemes)
    for target in targets:
        if target.flavour is not None:
            check_formats(formats, target.name, target.flavour, target.capabilities)
    return targets


def dialect_of(target: Target, precision: Precision, *, bf16_attentions: bool = False) -> str:
    """The graph dialect that a target runs at a precision.

    Args:
        bf16_attentions: an fp16 model has attentions that are computed in bf16.
    """
    if target.flavour is not None:
        return "trt"
    bf16 = bf16_attentions or precision.base == "bf16"
    return _emulating("ort", precision, bf16=bf16 and target.name == "ort-cpu")


def stepped_dialect_of(target: Target, precision: Precision, *, bf16_attentions: bool = False) -> str:
    """The dialect that verification steps through, call by call, on ONNX Runtime.

    Of a TensorRT target it is the standard graph, on the CPU: an engine cannot be stepped through.
    """
    if target.flavour is None:
        return dialect_of(target, precision, bf16_attentions=bf16_attentions)
    return _emulating("standard", precision, bf16=bf16_attentions or precision.base == "bf16")


def _emulating(dialect: str, precision: Precision, *, bf16: bool) -> str:
    """A dialect that ONNX Runtime can run: it has no kernels for bf16 on CPU, and none for FP4 anywhere.

    What it has not is emulated, and reports call it so.
    """
    emulated = ["fp4"] * (precision.name == "fp4") + ["bf16"] * bf16
    return "-".join([dialect, "emulated", *emulated]) if emulated else dialect


def execution_of(target: Target, precision: Precision) -> str:
    """How a target computes at a precision, in words for the report."""
    what = f"{precision.name} and {precision.base}" if precision.quantized else precision.name
    if target.flavour is not None:
        attention = "fused" if precision.base in target.flavour.fused_attention else "written out"
        return f"{target.flavour.name}, {what} kernels, {attention} attention"
    quantized = _QUANTIZED_IN_ORT[precision.name == "fp4"].format(precision.name) if precision.quantized else ""
    if target.name != "ort-cpu":
        return f"ONNX Runtime on CUDA, {quantized}{precision.base} kernels"
    return f"ONNX Runtime on CPU, {quantized}{_ON_CPU[precision.base]}"


# Which of the two: whether it is FP4.
_QUANTIZED_IN_ORT = (
    "{} by Quantize and Dequantize around the rest; the rest: ",
    "{} emulated: weights and inputs rounded to it by other ops; the rest: ",
)
_ON_CPU = {
    "fp32": "fp32 kernels",
    "fp16": "fp16 through casts around fp32 kernels",
    "bf16": "bf16 emulated: fp32 kernels, each result rounded through bf16",
}
