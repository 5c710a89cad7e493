"""How a parameter lies in the authors' own layout: one tensor where diffusers has several, and halves in other order.

The two directions are exact inverses, to the bit: rows are joined or cut, never computed with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit_deploy.checkpoint.key_tables import KeyLayout
from mmdit_deploy.checkpoint.keys import Parameter, Part


def stored_parts(parameter: Parameter, layout: KeyLayout) -> tuple[Part, ...]:
    """The tensors that hold a parameter in a layout: keys and shapes."""
    if layout == "diffusers" or parameter.original is None:
        return parameter.parts
    rows = sum(part.shape[0] for part in parameter.parts)
    return (Part(parameter.original, (rows, *parameter.parts[0].shape[1:])),)


def to_original(parameter: Parameter, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors of the original layout, of the canonical ones; see `stored_parts`.

    Args:
        parameter: whose.
        parts: its canonical tensors, in order.
    """
    if parameter.original is None:
        return tuple(parts)
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return (_swap_halves(joined) if parameter.swapped else joined,)


def from_original(parameter: Parameter, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The canonical tensors, of those of the original layout.

    Args:
        parameter: whose.
        stored: its tensors in the original layout, in the order of `stored_parts`.

    Returns:
        Views of them; where halves are swapped, of a copy.
    """
    if parameter.original is None:
        return tuple(stored)
    (tensor,) = stored
    joined = _swap_halves(tensor) if parameter.swapped else tensor
    return joined.split([part.shape[0] for part in parameter.parts])


def _swap_halves(tensor: Tensor) -> Tensor:
    """(scale, shift) of (shift, scale), and back, along the first axis."""
    return torch.cat(tensor.chunk(2)[::-1])
