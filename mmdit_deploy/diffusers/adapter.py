"""From the arguments of a diffusers transformer to the inputs of an engine, and back: what all families share.

    what a pipeline passes            what becomes of it
    one of `Adapter.tensors`          the engine's input of that name, as it is
    read by `Adapter.make`            inputs that are made of it: tokens of a latent, ids, a mask
    one of `Adapter.refused`          an error, unless it says nothing (None, False or 0)
    attention's kwargs                an error, unless empty or a LoRA scale of 1
    anything else                     an error

A family's adapter is data and two functions. It imports nothing of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.families import Grid, position_ids
from mmdit_deploy.spec import ModelSpec

_VECTORS = ("timestep", "guidance")  # one number for all samples, or one for each
_COMPILED_IN = "leave it out: an engine's attention cannot be changed"
_OF_ATTENTION = {
    "scale": "export with --lora FILE:SCALE, and leave the scale out: a LoRA is merged into an engine's weights",
    "ip_adapter_image_embeds": "run the pipeline without an IP-Adapter: an engine has none",
}


@dataclass(frozen=True)
class Call:
    """One call of the transformer.

    Args:
        spec: the architecture.
        contract: of the engine.
        hidden_states: what the pipeline denoises: [B, C, H, W] for SD3, tokens [B, N, C] else.
        arguments: the others that are not None, by diffusers' names.
    """

    spec: ModelSpec
    contract: Contract
    hidden_states: Tensor
    arguments: Mapping[str, Any]

    @property
    def batch(self) -> int:
        return len(self.hidden_states)

    @property
    def txt_tokens(self) -> int:
        """How many; 0 where there is no text at all, which the contract's check refuses."""
        text = self.arguments.get("encoder_hidden_states")
        return 0 if text is None else text.shape[1]

    def ids(self, *images: Grid) -> dict[str, Tensor]:
        """Position ids of images of so many rows and columns of tokens, as the contract calls them."""
        return _ids(self.spec, images, self.txt_tokens, self.hidden_states.device)


def _as_it_is(call: Call, sample: Tensor) -> Tensor:
    return sample


@dataclass(frozen=True)
class Adapter:
    """How diffusers calls a family's transformer.

    Args:
        tensors: arguments that are inputs of the engine.
        made_of: other arguments, that `make` reads.
        make: inputs of the engine that are made of the arguments; it may replace those in `tensors`.
        attention_kwargs: what the argument for attention processors is called.
        refused: arguments that an engine cannot follow, and what to do instead.
        moot: arguments that only say how a refused one is to be read.
        restore: the engine's tokens as diffusers' class returns them.
        output: module and name of the class of what is returned.
    """

    tensors: tuple[str, ...]
    make: Callable[[Call], dict[str, Tensor]]
    made_of: tuple[str, ...] = ()
    attention_kwargs: str = "joint_attention_kwargs"
    refused: Mapping[str, str] = field(default_factory=dict)
    moot: tuple[str, ...] = ()
    restore: Callable[[Call, Tensor], Tensor] = _as_it_is
    output: tuple[str, str] = ("diffusers.models.modeling_outputs", "Transformer2DModelOutput")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Every argument of the forward of diffusers' class, besides ``hidden_states`` and ``return_dict``."""
        return (*self.tensors, *self.made_of, self.attention_kwargs, *self.refused, *self.moot)

    def inputs(self, call: Call) -> dict[str, Tensor]:
        """The engine's inputs, contiguous and in the contract's types, on the device that they came on.

        Raises:
            UsageError: an argument is unknown, or asks for what an engine cannot do.
            ContractError: a tensor is not of a shape that has tokens.
        """
        self._check(call.arguments)
        inputs = {name: call.arguments[name] for name in self.tensors if name in call.arguments}
        inputs.update(self.make(call))
        dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in call.contract.inputs}
        for name in inputs:
            if name in _VECTORS:
                inputs[name] = _vector(inputs[name], call.batch)
            inputs[name] = inputs[name].to(dtypes.get(name)).contiguous()
        return inputs

    def _check(self, arguments: Mapping[str, Any]) -> None:
        unknown = sorted(set(arguments) - set(self.arguments))
        if unknown:
            raise UsageError(
                f"this transformer takes {', '.join(self.arguments)}",
                received=", ".join(unknown),
                fix="leave it out; a newer diffusers may pass what this version does not know",
            )
        for name, fix in self.refused.items():
            if not _says_nothing(arguments.get(name)):
                raise UsageError(
                    f"an engine takes no {name}", received=f"{name} of type {type(arguments[name]).__name__}", fix=fix
                )
        for name, value in (arguments.get(self.attention_kwargs) or {}).items():
            if not (name == "scale" and value == 1):
                raise UsageError(
                    f"{self.attention_kwargs} are empty: they are for attention layers and LoRAs, which an engine has "
                    "compiled in",
                    received=f"{name}={value!r}"[:200],
                    fix=_OF_ATTENTION.get(name, _COMPILED_IN),
                )


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, bool | int) and not value)


def _vector(tensor: Tensor, batch: int) -> Tensor:
    """One number for each sample."""
    return tensor.reshape(-1).expand(batch) if tensor.numel() == 1 else tensor


@functools.lru_cache(maxsize=16)  # every step of a schedule has the same
def _ids(spec: ModelSpec, images: tuple[Grid, ...], txt_tokens: int, device: torch.device) -> dict[str, Tensor]:
    img_ids, txt_ids = (torch.from_numpy(ids).to(device) for ids in position_ids(spec, images, txt_tokens))
    return {"img_ids": img_ids, "txt_ids": txt_ids} if spec.rope_axes else {"img_ids": img_ids}


def without_batch(ids: Tensor) -> Tensor:
    """Ids [tokens, axes] of ids that may have a batch, all samples of which are alike, as diffusers takes them."""
    return ids[0] if ids.ndim == 3 else ids


def check_tokens(images: tuple[Grid, ...], tokens: int) -> None:
    """Check that images have as many tokens as there are.

    Raises:
        ContractError: they do not.
    """
    if sum(rows * cols for rows, cols in images) != tokens:
        raise ContractError(
            "the images of img_shapes have as many tokens as hidden_states",
            received=f"{' + '.join(f'{rows} × {cols}' for rows, cols in images)}, and {tokens} tokens",
            fix="pass rows and columns of the image that is made, then of its references",
        )
