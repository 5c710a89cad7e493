"""The symbolic axes of an engine, the sizes that they may have, and TensorRT's optimization profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmdit_deploy.errors import UsageError

AXES = ("batch", "img_tokens", "txt_tokens")
TOKENS = "img_tokens + txt_tokens"  # the axis of both streams' tokens: a sum of axes is an axis


@dataclass(frozen=True)
class Range:
    """Sizes that an axis may have: from `min` to `max`, tuned for `opt`."""

    min: int
    opt: int
    max: int

    @staticmethod
    def parse(axis: str, text: str) -> Range:
        """Read ``MIN:OPT:MAX``, or one number for a static axis.

        Raises:
            UsageError: not three whole numbers with 1 ≤ MIN ≤ OPT ≤ MAX.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(p.isdecimal() and len(p) < 10 for p in parts):
            raise UsageError(
                f"the range of {axis} is MIN:OPT:MAX in whole numbers of at most nine digits",
                received=repr(text),
                fix=f"e.g. {DEFAULT_RANGES[axis]}",
            )
        numbers = [int(p) for p in parts]
        low, opt, high = numbers * 3 if len(numbers) == 1 else numbers
        if not 1 <= low <= opt <= high:
            raise UsageError(
                f"the range of {axis} needs 1 ≤ MIN ≤ OPT ≤ MAX",
                received=text,
                fix=f"e.g. {DEFAULT_RANGES[axis]}",
            )
        return Range(low, opt, high)

    def clamp(self, size: int) -> int:
        """The size nearest to `size` within the range."""
        return min(max(size, self.min), self.max)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


DEFAULT_RANGES: Mapping[str, Range] = {
    "batch": Range(1, 2, 4),
    "img_tokens": Range(256, 4096, 16384),
    # A minimum of one token is allowed, and costs TensorRT plans several kernels a block.
    "txt_tokens": Range(2, 333, 512),
}


def axis_size(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of a symbolic axis: its own, or the sum of those that it is the sum of."""
    return sizes[axis] if axis in sizes else sum(sizes[part] for part in axis.split(" + "))


def axis_range(axis: str, ranges: Mapping[str, Range]) -> Range:
    """The sizes that a symbolic axis may have, a sum of axes too."""
    parts = [ranges[part] for part in axis.split(" + ")]
    return Range(sum(p.min for p in parts), sum(p.opt for p in parts), sum(p.max for p in parts))


Profile = Mapping[str, Range]  # by axis: what one TensorRT optimization profile is built and tuned for


def parse_profile(text: str) -> dict[str, Range]:
    """Read ``AXIS=MIN:OPT:MAX,…``, e.g. ``batch=2,img_tokens=1024:4096:4096``. Axes that are left out are not in it.

    Raises:
        UsageError: an axis is unknown or repeated, or a range is none.
    """
    profile: dict[str, Range] = {}
    for part in text.split(","):
        axis, equals, numbers = part.partition("=")
        if axis not in AXES or not equals or axis in profile:
            raise UsageError(
                f"a profile gives ranges to some of the axes {', '.join(AXES)}, each once",
                received=repr(text),
                fix="e.g. --profile batch=2,img_tokens=1024:4096:4096",
            )
        profile[axis] = Range.parse(axis, numbers)
    return profile


def profile_to_json(profile: Profile) -> dict[str, list[int]]:
    """Ranges by axis, as ``[min, opt, max]``."""
    return {axis: [r.min, r.opt, r.max] for axis, r in profile.items()}


def profile_from_json(data: Mapping[str, Sequence[int]]) -> dict[str, Range]:
    """Read what `profile_to_json` wrote."""
    return {axis: Range(*sizes) for axis, sizes in data.items()}


def spanned(profiles: Sequence[Profile]) -> dict[str, Range]:
    """The range that the profiles cover together, of each axis that all of them name."""
    axes = [axis for axis in AXES if profiles and all(axis in profile for profile in profiles)]
    return {
        axis: Range(min(p[axis].min for p in profiles), profiles[0][axis].opt, max(p[axis].max for p in profiles))
        for axis in axes
    }


def within(profile: Profile, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The profile with every axis, each within its range."""
    for axis, range_ in profile.items():
        if range_.min < ranges[axis].min or range_.max > ranges[axis].max:
            raise UsageError(
                f"a profile's {axis} lies within its range, {ranges[axis]}",
                received=str(range_),
                fix=f"widen --{axis.replace('_', '-')}, or drop it: it is then what the profiles span",
            )
    return {axis: profile.get(axis, ranges[axis]) for axis in AXES}
