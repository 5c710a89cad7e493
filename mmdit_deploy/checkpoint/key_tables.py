"""The families' tables of keys, read from the checkpoint's side: which tensor fits which family, in which layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mmdit_deploy.families import FAMILIES, Family, Keys, Shapes

KeyLayout = Literal["diffusers", "original"]


class KeyTable:
    """Every key that checkpoints of one family may have in one layout.

    Attributes:
        family: the family.
        layout: ``original`` is the authors' own.
    """

    def __init__(self, family: Family, layout: KeyLayout) -> None:
        self.family = family
        self.layout = layout
        self._modules: dict[str, Keys] = {}
        for keys in family.keys:
            names = keys.diffusers if layout == "diffusers" else (keys.original,)
            self._modules.update({name: keys for name in names if name})
        self._buffers = family.buffers if layout == "diffusers" else {v: k for k, v in family.buffers.items()}

    @property
    def title(self) -> str:
        """For people: ``FLUX.1, original layout``."""
        return f"{self.family.title}, {self.layout} layout"

    def spelled(self, key: str) -> str | None:
        """A key as the layout's authors spell it; None for one that does not fit.

        ComfyUI calls the norms of Black Forest Labs ``weight`` where they call them ``scale``.
        """
        if key in self._buffers:
            return key
        module, _, leaf = key.rpartition(".")
        keys = self._modules.get(_pattern(module)[0])
        if keys is None:
            return None
        if keys.scale and self.layout == "original":
            return f"{module}.scale" if leaf in ("scale", "weight") else None
        return key if leaf in ("weight", "bias") else None

    def canonical_shapes(self, shapes: Shapes) -> Shapes:
        """Shapes under diffusers' keys, before the architecture is known.

        Args:
            shapes: of tensors whose keys all fit.

        Raises:
            LookupError: the width cannot be told, or a tensor is a scalar.
        """
        if self.layout == "diffusers":
            return shapes
        width = self._width(shapes)
        found: dict[str, tuple[int, ...]] = {}
        for key, shape in shapes.items():
            if key in self._buffers:
                found[self._buffers[key]] = shape
                continue
            module, _, leaf = key.rpartition(".")
            pattern, index = _pattern(module)
            keys = self._modules[pattern]
            for name, rows in zip(keys.diffusers, keys.rows(shape[0], width), strict=True):
                canonical = f"{name.replace('*', index)}.{'weight' if keys.scale else leaf}"
                found[canonical] = (rows, *shape[1:])
        return found

    def _width(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Of the model: what every family's image projection gives."""
        module = next(name for name, keys in self._modules.items() if keys.path == "img_embed.proj")
        return shapes[f"{module}.weight"][0]


def _pattern(module: str) -> tuple[str, str]:
    """A module of a block as the tables have it, and the block's index: ``("double_blocks.*.img_mlp.0", "7")``."""
    steps = module.split(".")
    if len(steps) > 1 and steps[1].isascii() and steps[1].isdecimal():
        return ".".join([steps[0], "*", *steps[2:]]), steps[1]
    return module, ""


def _tables(family: Family) -> tuple[KeyTable, ...]:
    own = any(keys.original for keys in family.keys)
    return KeyTable(family, "diffusers"), *([KeyTable(family, "original")] if own else [])


KEY_TABLES: tuple[KeyTable, ...] = tuple(table for family in FAMILIES.values() for table in _tables(family))
