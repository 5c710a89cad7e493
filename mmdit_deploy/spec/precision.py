"""The precisions an engine can have: a compute type, and how linear layers are quantized on top of it.

Names of compute types are used the same way in torch, ONNX and safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmdit_deploy.errors import UsageError


@dataclass(frozen=True)
class Precision:
    """One precision.

    Args:
        name: as on the command line, e.g. ``fp16`` or ``fp8``.
        dtype: torch's and numpy's name of the compute type: that of activations, engine I/O, and of weights that are
            not quantized.
        itemsize: bytes per value of that type.
        base: the compute type's own name on the command line; of ``fp16`` it is ``fp16``.
    """

    name: str
    dtype: str
    itemsize: int
    base: str

    @property
    def quantized(self) -> bool:
        """Whether linear layers are quantized; the rest is in the compute type."""
        return self.name != self.base

    @property
    def label(self) -> str:
        """For names of bundles: ``fp8`` on fp16 is ``fp8``, on bf16 ``fp8-bf16``."""
        return self.name if self.base in (self.name, DEFAULT_BASE) else f"{self.name}-{self.base}"


DEFAULT_BASE = "fp16"
PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", "float32", 4, "fp32"),
        Precision("fp16", "float16", 2, "fp16"),
        Precision("bf16", "bfloat16", 2, "bf16"),
    )
}
BASES = ("fp16", "bf16")
QUANTIZED = ("fp8", "int8", "fp4", "w4a16")


def precision(name: str, base: str | None = None) -> Precision:
    """Look a precision up by its command-line name.

    Args:
        base: the compute type of what is not quantized; fp16 where not given. Only a quantized precision has one.

    Raises:
        UsageError: there is no such precision or base, or a compute type was given another one as its base.
    """
    if name in PRECISIONS:
        if base not in (None, name):
            raise UsageError(
                f"--base goes with {', '.join(f'--{q}' for q in QUANTIZED)}: the rest of such a model",
                received=f"--base {base} with --{name}",
                fix="drop --base",
            )
        return PRECISIONS[name]
    if name not in QUANTIZED:
        raise UsageError(
            f"a precision is one of {', '.join((*PRECISIONS, *QUANTIZED))}", received=repr(name), fix="use --fp16"
        )
    if base is not None and base not in BASES:
        raise UsageError(f"a base is one of {', '.join(BASES)}", received=repr(base), fix="--base fp16")
    return replace(PRECISIONS[base or DEFAULT_BASE], name=name)
