"""Which GPUs have which formats: what is refused before a build, because it would fail in it.

TensorRT-RTX 1.7 was asked for each: where one capability of several lacks a format, the whole engine cannot be built
("Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3").
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmdit_deploy.build.flavours import Flavour
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import SCHEMES, Scheme
from mmdit_deploy.spec import Precision


@dataclass(frozen=True)
class Format:
    """A number format that not every GPU has.

    Args:
        name: for people.
        least: the first compute capability that has it.
        fix: what to use instead.
    """

    name: str
    least: tuple[int, int]
    fix: str


# By the name of a compute type, or of a scheme's weights. INT8 is not here: every GPU that we build for has it.
FORMATS = {
    "bf16": Format("bf16", (8, 0), "--fp16 or --base fp16"),
    "int4": Format("INT4 (w4a16)", (8, 0), "--int8"),
    "fp8": Format("FP8", (8, 9), "--int8"),
    "fp4": Format("FP4", (10, 0), "--fp8 from sm89 on, --w4a16 from sm80 on"),
}


def formats_of(precision: Precision, schemes: Collection[Scheme] = ()) -> tuple[str, ...]:
    """The formats of a model that not every GPU has, by their names in `FORMATS`.

    Args:
        schemes: that linear layers are quantized by, besides those of the precision's own name.
    """
    own = [SCHEMES[precision.name]] if precision.quantized else []
    used = {precision.base, *(scheme.weights for scheme in (*own, *schemes))}
    return tuple(name for name in FORMATS if name in used)


def check_formats(formats: Collection[str], target: str, flavour: Flavour, capabilities: Sequence[str]) -> None:
    """Refuse a target that lacks a format.

    Args:
        formats: of `formats_of`.
        target: its name.
        capabilities: that the target names, e.g. ``("sm86", "sm89")``; empty for this machine's GPU, about which
            nothing is said where torch sees none.

    Raises:
        UsageError: one of them lacks one of the formats.
    """
    numbers = {sm: _number(flavour.capabilities[sm]) for sm in capabilities} or _of_this_machine()
    for name in formats:
        needed = FORMATS[name]
        lacking = [sm for sm, number in numbers.items() if number < needed.least]
        if lacking:
            least = "".join(map(str, needed.least))
            given = target if target.endswith("+".join(lacking)) else f"{target}: {', '.join(lacking)}"
            drop = f", or drop {' and '.join(lacking)}" if len(lacking) < len(numbers) else ""
            raise UsageError(
                f"{needed.name} needs a GPU of compute capability sm{least} or later",
                received=given,
                fix=f"{needed.fix}{drop}",
            )


def _of_this_machine() -> dict[str, tuple[int, int]]:
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {f"sm{major}{minor} (this machine's GPU)": (major, minor)}


def _number(capability: str) -> tuple[int, int]:
    """``8.9`` as (8, 9)."""
    major, minor = capability.split(".")
    return int(major), int(minor)
