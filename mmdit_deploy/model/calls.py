"""The model as a chain of calls of pure functions: what the graph assembles and what verification steps through.

`MMDiT.forward` is the same chain, written for people; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from mmdit_deploy.contract import TensorSpec
from mmdit_deploy.model.blocks import JointBlock, Modulation
from mmdit_deploy.model.embeddings import Conditioning, ImageEmbed, TextEmbed
from mmdit_deploy.model.mmdit import FinalLayer, block_index
from mmdit_deploy.spec import BlockSpec, ModelSpec


@dataclass(frozen=True)
class Kind:
    """One pure function of (activations, weights), traced once however often it is called.

    Args:
        function: its name in the graph, unique over all domains.
        build: makes the module whose weights become the function's last inputs.
        inputs, outputs: the activations; the dtype ``compute`` stands for the engine's compute type.
    """

    function: str
    build: Callable[[], nn.Module] = field(compare=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Call:
    """One call of a kind in the model.

    Args:
        path: the submodule of `MMDiT` that it calls, which is also the call's name: ``blocks.3``.
        inputs, outputs: names of the values it reads and makes, in the kind's order.
    """

    path: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def calls(spec: ModelSpec, outputs: Sequence[str] = ()) -> tuple[Call, ...]:
    """The model's calls, in order; the last makes ``sample``.

    Args:
        outputs: names of block outputs to expose, e.g. ``blocks.12``: that block's image tokens get that name.

    Raises:
        SpecError: an output is none of the model's blocks.
    """
    exposed = {block_index(name, spec) for name in outputs}
    img_names = [f"blocks.{i}" if i in exposed else f"blocks.{i}.img" for i in range(spec.depth)]

    chain = [
        Call("conditioning", _conditioning(spec), ("timestep", "pooled_projections"), ("conditioning",)),
        Call("img_embed", _img_embed(spec), ("hidden_states", "img_ids"), ("img_embed",)),
        Call("txt_embed", _txt_embed(spec), ("encoder_hidden_states",), ("txt_embed",)),
    ]
    img, txt = "img_embed", "txt_embed"
    for i, block in enumerate(spec.blocks):
        modulations = []
        for stream, tensors in (("img", block.img_modulations), ("txt", block.txt_modulations)):
            path = f"modulations.{i}.{stream}"
            chain.append(Call(path, _modulation(spec, tensors), ("conditioning",), (path,)))
            modulations.append(path)
        made = (img_names[i],) if block.text_ends else (img_names[i], f"blocks.{i}.txt")
        chain.append(Call(f"blocks.{i}", _block(spec, block), (img, txt, *modulations), made))
        img, txt = made[0], made[-1]
    chain.append(Call("final_modulation", _modulation(spec, 2), ("conditioning",), ("final_modulation",)))
    chain.append(Call("final", _final(spec), (img, "final_modulation"), ("sample",)))
    return tuple(chain)


def _img(name: str, channels: int) -> TensorSpec:
    return TensorSpec(name, ("batch", "img_tokens", channels), "compute")


def _txt(name: str, channels: int) -> TensorSpec:
    return TensorSpec(name, ("batch", "txt_tokens", channels), "compute")


def _per_sample(name: str, *sizes: int) -> TensorSpec:
    return TensorSpec(name, ("batch", *sizes), "compute")


def _conditioning(spec: ModelSpec) -> Kind:
    return Kind(
        "MMDiTConditioning",
        lambda: Conditioning(spec),
        (TensorSpec("timestep", ("batch",), "float32"), _per_sample("pooled_projections", spec.pooled_dim)),
        (_per_sample("conditioning", spec.cond_dim),),
    )


def _img_embed(spec: ModelSpec) -> Kind:
    return Kind(
        "MMDiTImageEmbed",
        lambda: ImageEmbed(spec),
        (_img("hidden_states", spec.img_dim), TensorSpec("img_ids", ("img_tokens", 2), "float32")),
        (_img("img", spec.width),),
    )


def _txt_embed(spec: ModelSpec) -> Kind:
    return Kind(
        "MMDiTTextEmbed",
        lambda: TextEmbed(spec),
        (_txt("encoder_hidden_states", spec.txt_dim),),
        (_txt("txt", spec.width),),
    )


def _modulation(spec: ModelSpec, tensors: int) -> Kind:
    return Kind(
        f"MMDiTModulation{tensors}",
        lambda: Modulation(spec.cond_dim, spec.width, tensors),
        (_per_sample("conditioning", spec.cond_dim),),
        (_per_sample("modulation", 1, tensors * spec.width),),
    )


def _block(spec: ModelSpec, block: BlockSpec) -> Kind:
    prefix = ("Dual" if block.dual_attention else "") + ("Last" if block.text_ends else "")
    outputs = (_img("img_out", spec.width), _txt("txt_out", spec.width))
    return Kind(
        f"MMDiT{prefix}JointBlock",
        lambda: JointBlock(spec, block),
        (
            _img("hidden_states", spec.width),
            _txt("encoder_hidden_states", spec.width),
            _per_sample("img_modulation", 1, block.img_modulations * spec.width),
            _per_sample("txt_modulation", 1, block.txt_modulations * spec.width),
        ),
        outputs[:1] if block.text_ends else outputs,
    )


def _final(spec: ModelSpec) -> Kind:
    return Kind(
        "MMDiTFinalLayer",
        lambda: FinalLayer(spec),
        (_img("hidden_states", spec.width), _per_sample("modulation", 1, 2 * spec.width)),
        (_img("sample", spec.out_dim),),
    )
