"""Values out of files, as lines for people: whatever a file says cannot steer a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmdit_deploy.cli.terminal import table


def plain(value: object) -> str:
    """One line of printable characters: names come from files."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def titled(title: str, rows: Sequence[Sequence[object]]) -> str:
    """A table of plain cells under its title; nothing where there are no rows."""
    return f"{title}\n{table([[plain(cell) for cell in row] for row in rows])}" if rows else ""


def shown_axes(axes: Iterable[str | int]) -> str:
    """A tensor's axes: ``[batch, img_tokens, 64]``."""
    return "[" + ", ".join(str(axis) for axis in axes) + "]"


def in_units(nbytes: int) -> str:
    """Bytes in decimal units, as disks are sold: ``4.06 GB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
