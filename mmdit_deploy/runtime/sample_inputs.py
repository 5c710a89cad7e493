"""What a sampler hands to an engine: latent, references and prompts, on its device and in its types.

Whoever samples has tensors of any device and type, and one prompt for many images. They are brought over once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import Grid
from mmdit_deploy.runtime.engine import Engine
from mmdit_deploy.runtime.tensors import Array, as_tensors

MASK = "encoder_hidden_states_mask"
TEXT = ("encoder_hidden_states", MASK, "pooled_projections")
Prompt = Mapping[str, Array]


def latent_of(engine: Engine, noise: Array, grid: Grid) -> Tensor:
    """The latent to start from, [B, N, C_out] fp32.

    Raises:
        UsageError: it is not of the grid's size or of the model's channels, or the model has no such positions.
    """
    spec, most = engine.bundle.spec, engine.contract.max_side
    if most is not None and max(grid) > most:
        raise UsageError(
            f"{spec.name} has positions for {most} × {most} tokens",
            received=f"{grid[0]} × {grid[1]}",
            fix=f"an image of at most {most} rows and columns",
        )
    latent = as_tensors({"noise": noise})[0]["noise"].detach().to(engine.device, torch.float32)
    expected = (math.prod(grid), spec.out_dim)
    if latent.ndim != 3 or tuple(latent.shape[1:]) != expected or not len(latent):
        raise UsageError(
            f"the noise of {grid[0]} × {grid[1]} tokens of {spec.name} is [batch, {expected[0]}, {expected[1]}]",
            received=str(list(latent.shape)),
            fix="torch.randn of that shape, or mmdit_deploy.sampling.patchify(latents)",
        )
    return latent


def hidden_of(engine: Engine, latent: Tensor, references: Sequence[tuple[Array, Grid]], beside: Array | None) -> Tensor:
    """The engine's ``hidden_states``: the latent, channels beside it, and references after it.

    Raises:
        UsageError: channels or tokens are missing, or too many.
    """
    spec = engine.bundle.spec
    batch, tokens, channels = latent.shape
    dtype = next(getattr(torch, t.dtype) for t in engine.contract.inputs if t.name == "hidden_states")

    def part(name: str, array: Array, length: int, width: int) -> Tensor:
        tensor = _for_all(name, as_tensors({name: array})[0][name], batch)
        if tuple(tensor.shape) != (batch, length, width):
            raise UsageError(
                f"{name} is [batch, {length}, {width}] for {spec.name}, which takes tokens of {spec.img_dim} channels",
                received=str(list(tensor.shape)),
                fix="make it so",
            )
        return tensor.to(engine.device, dtype)

    first = latent.to(dtype)
    if spec.img_dim > channels or beside is not None:
        given = latent[:, :, :0] if beside is None else beside
        first = torch.cat([first, part("beside", given, tokens, spec.img_dim - channels)], dim=2)
    after = (part(f"references[{i}]", t, math.prod(g), spec.img_dim) for i, (t, g) in enumerate(references))
    return torch.cat([first, *after], dim=1)


def text_of(engine: Engine, prompt: Prompt, batch: int) -> dict[str, Tensor]:
    """What an engine reads of a prompt, for each sample. Without a mask, all tokens count.

    Raises:
        UsageError: something is missing, or is not for this model.
    """
    types = {t.name: getattr(torch, t.dtype) for t in engine.contract.inputs if t.name in TEXT}
    given = as_tensors(prompt)[0]
    if MASK in types and "encoder_hidden_states" in given:
        given.setdefault(MASK, torch.ones(given["encoder_hidden_states"].shape[:2], dtype=torch.bool))
    if set(given) != set(types):
        raise UsageError(
            f"a prompt for {engine.bundle.spec.name} is {', '.join(types)}",
            received=", ".join(given) or "nothing",
            fix="pass exactly these" + (f"; {MASK} may be left out" if MASK in types else ""),
        )
    return {
        name: _for_all(name, given[name], batch).to(engine.device, dtype).contiguous() for name, dtype in types.items()
    }


def joined(without: Mapping[str, Tensor], with_prompt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two texts as one of twice the batch.

    Raises:
        UsageError: they are not of one length.
    """
    for name, tensor in without.items():
        if tensor.shape != with_prompt[name].shape:
            raise UsageError(
                "both texts of guidance in one batch have one length",
                received=f"{name}: {list(tensor.shape)} without and {list(with_prompt[name].shape)} with the prompt",
                fix="pad them, or one_batch=False",
            )
    return {name: torch.cat([tensor, with_prompt[name]]) for name, tensor in without.items()}


def _for_all(name: str, tensor: Tensor, batch: int) -> Tensor:
    """One for each sample: a batch of one is repeated."""
    if not tensor.ndim or len(tensor) not in (1, batch):
        raise UsageError(
            f"{name} has one sample for all {batch}, or one for each", received=str(list(tensor.shape)), fix="repeat it"
        )
    return tensor.expand(batch, *tensor.shape[1:])
