"""How far an engine may be from the eager fp32 model: the figures of `tolerances.toml`, or of a user's file like it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mmdit_deploy.errors import UsageError
from mmdit_deploy.spec import PRECISIONS, QUANTIZED

NAMES = (*PRECISIONS, *QUANTIZED)
OURS = "tolerances.toml of mmdit-deploy"


@dataclass(frozen=True)
class Tolerance:
    """Bounds that bind the final output and each block's local error, or the latent at the end of a trajectory.

    Args:
        min_cosine: least cosine similarity, over all elements of a tensor.
        max_rel_l2: largest ‖engine − reference‖ / ‖reference‖.
        reason: why these numbers.
    """

    min_cosine: float
    max_rel_l2: float
    reason: str


@dataclass(frozen=True)
class ImageTolerance:
    """Bounds that bind the image at the end of a trajectory.

    Args:
        min_psnr: least peak signal-to-noise ratio, dB.
        min_ssim: least structural similarity.
        reason: why these numbers.
        max_lpips: largest perceptual distance; None where it only is reported.
    """

    min_psnr: float
    min_ssim: float
    reason: str
    max_lpips: float | None = None


@dataclass(frozen=True)
class Tolerances:
    """The bounds of every level, by name of the precision.

    Args:
        step: of one call of the model, and of each call of a block.
        trajectory: of the latent after the last step.
        image: of the image that it becomes.
        source: the file that they are from, in words.
    """

    step: Mapping[str, Tolerance]
    trajectory: Mapping[str, Tolerance]
    image: Mapping[str, ImageTolerance]
    source: str = OURS


def load_tolerances(path: str | Path) -> Tolerances:
    """A user's tolerances, stricter or looser; what the file does not name is ours.

    Args:
        path: TOML with tables ``[step.NAME]``, ``[trajectory.NAME]`` and ``[image.NAME]`` for names of precisions. A
            table may have some of the keys; without a ``reason``, the reason is the file.

    Raises:
        UsageError: the file cannot be read, or it has a table, a key or a value that is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "--tolerances takes a TOML file", received=f"{path}: {error}", fix="name one that can be read"
        ) from error
    return _read(text, str(path), DEFAULTS)


def bounds_of(tolerance: Tolerance | ImageTolerance) -> dict[str, float]:
    """The bounds that a tolerance has, by key: ``{"min_cosine": 0.997, "max_rel_l2": 0.08}``."""
    values = {f.name: getattr(tolerance, f.name) for f in fields(tolerance) if f.name != "reason"}
    return {name: value for name, value in values.items() if value is not None}


_LEVELS: dict[str, type[Tolerance] | type[ImageTolerance]] = {
    "step": Tolerance,
    "trajectory": Tolerance,
    "image": ImageTolerance,
}
# What a figure can be at all; a bound outside of it would bind nothing, or everything.
_LIMITS = {
    "min_cosine": (-1.0, 1.0),
    "max_rel_l2": (0.0, math.inf),
    "min_psnr": (0.0, math.inf),
    "min_ssim": (-1.0, 1.0),
    "max_lpips": (0.0, math.inf),
}
Bounds = TypeVar("Bounds", Tolerance, ImageTolerance)


def _read(text: str, source: str, base: Tolerances | None) -> Tolerances:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError("tolerances are TOML", received=f"{source}: {error}", fix="correct that line") from error
    _known(data, tuple(_LEVELS), source, "a table")
    levels: dict[str, Any] = {}
    for level, kind in _LEVELS.items():
        tables = _table(data.get(level, {}), f"{source}: {level}")
        _known(tables, NAMES, f"{source}: {level}", "a precision")
        ours = {} if base is None else getattr(base, level)
        levels[level] = {
            **ours,
            **{
                name: _bounds(_table(table, f"{source}: {level}.{name}"), kind, ours.get(name), source, level, name)
                for name, table in tables.items()
            },
        }
    return Tolerances(**levels, source=source)


def _bounds(
    table: Mapping[str, Any], kind: type[Bounds], ours: Bounds | None, source: str, level: str, name: str
) -> Bounds:
    place = f"{source}: {level}.{name}"
    _known(table, tuple(f.name for f in fields(kind)), place, "a key")
    values: dict[str, Any] = {k: v if k == "reason" else _number(v, k, place) for k, v in table.items()}
    reason = values.setdefault("reason", f"as {source} says")
    if not isinstance(reason, str):
        raise UsageError("a reason is a text", received=f"{place}.reason = {reason!r}", fix="put it in quotes")
    return kind(**values) if ours is None else replace(ours, **values)


def _number(value: Any, key: str, place: str) -> float:
    least, most = _LIMITS[key]
    # TOML's true is an int to Python, and its nan compares false with everything.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UsageError(
            f"{key} is a number from {least:g} to {most:g}", received=f"{place}.{key} = {value!r}", fix="correct it"
        )
    return float(value)


def _table(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError("tolerances are tables", received=f"{place} = {value!r}", fix="e.g. [step.fp8]")
    return value


def _known(table: Mapping[str, Any], names: tuple[str, ...], place: str, what: str) -> None:
    unknown = sorted(set(table) - set(names))
    if unknown:
        raise UsageError(
            f"{what} of tolerances is one of {', '.join(names)}",
            received=f"{place} has {', '.join(unknown)}",
            fix="e.g. [step.fp8] with max_rel_l2 = 0.05",
        )


DEFAULTS = _read(resources.files("mmdit_deploy.verify").joinpath("tolerances.toml").read_text("utf-8"), OURS, None)
TOLERANCES = DEFAULTS.step
"""Of one step, by name of the precision."""
