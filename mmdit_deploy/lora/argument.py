"""`FILE[:SCALE]`, as the command line takes it."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mmdit_deploy.checkpoint.strict_json import quote
from mmdit_deploy.errors import UsageError

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def parse_lora(text: str) -> tuple[Path, float]:
    """Split a file from its scale.

    Args:
        text: e.g. ``style.safetensors:0.8``. A file that exists under the whole text is that file, colons and all.

    Returns:
        The path and the scale, 1 where none is given; whether there is such a file is not looked at.

    Raises:
        UsageError: there is no file, or what follows the last colon is no finite number.
    """
    file, colon, scale = text.rpartition(":")
    if text and (not colon or Path(text).exists()):
        return Path(text), 1.0
    value = float(scale) if _NUMBER.fullmatch(scale) else math.nan
    if not file or not math.isfinite(value):
        raise UsageError(
            "--lora takes FILE or FILE:SCALE, where SCALE is a finite number: 1, 0.8, -0.5",
            received=quote(text),
            fix="e.g. --lora style.safetensors:0.8",
        )
    return Path(file), value
