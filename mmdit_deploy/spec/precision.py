"""The compute types an engine can have. Each name is used the same way in torch, ONNX and safetensors."""

from __future__ import annotations

from dataclasses import dataclass

from mmdit_deploy.errors import UsageError


@dataclass(frozen=True)
class Precision:
    """One compute type: that of activations, weights and engine I/O.

    Args:
        name: as on the command line, e.g. ``fp16``.
        dtype: its torch and numpy name, e.g. ``float16``.
        itemsize: bytes per value.
    """

    name: str
    dtype: str
    itemsize: int


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", "float32", 4),
        Precision("fp16", "float16", 2),
        Precision("bf16", "bfloat16", 2),
    )
}


def precision(name: str) -> Precision:
    """Look a precision up by its command-line name.

    Raises:
        UsageError: there is no such precision.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise UsageError(
            f"a precision is one of {', '.join(PRECISIONS)}", received=repr(name), fix="use --fp16"
        ) from None
