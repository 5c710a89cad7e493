"""The model as a chain of calls of pure functions: what the graph assembles and what verification steps through.

`MMDiT.forward` is the same chain, written for people; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from mmdit_deploy.contract import TOKENS, TensorSpec
from mmdit_deploy.model.blocks import SINGLE_MODULATIONS, JointBlock, Modulation, SingleBlock
from mmdit_deploy.model.embeddings import (
    AttentionMask,
    Conditioning,
    ImageEmbed,
    References,
    Residuals,
    RotaryPositions,
    TextEmbed,
)
from mmdit_deploy.model.mmdit import FinalLayer, Join, Split, check_block
from mmdit_deploy.spec import BlockSpec, ModelSpec


@dataclass(frozen=True)
class Kind:
    """One pure function of (activations, weights), traced once however often it is called.

    Args:
        function: its name in the graph, unique over all domains.
        build: makes the module whose weights become the function's last inputs.
        inputs: the activations, by the names of the arguments of the module's ``forward``.
        outputs: what it makes. The dtype ``compute`` stands for the engine's compute type.
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
        block: the block that it is, or makes the modulation of; None for what no block has to itself.
        modulates: whether it makes modulation tensors.
    """

    path: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    block: str | None = None
    modulates: bool = False


def calls(spec: ModelSpec, outputs: Sequence[str] = ()) -> tuple[Call, ...]:
    """The model's calls, in order; the last makes ``sample``.

    Args:
        outputs: names of block outputs to expose, e.g. ``blocks.12``: that block's tokens get that name.

    Raises:
        SpecError: an output is none of the model's blocks.
    """
    for name in outputs:
        check_block(name, spec)
    chain = _embedding(spec)
    everywhere = [name for call in chain for name in call.outputs if name in _EVERYWHERE]
    img, txt = "img_embed", "txt_embed"
    for i, block in enumerate(spec.blocks):
        path = f"blocks.{i}"
        modulations = [
            _modulate(chain, spec, path, stream, tensors)
            for stream, tensors in (("img", block.img_modulations), ("txt", block.txt_modulations))
        ]
        reads = [img, txt, *modulations, *everywhere]
        if block.residual:
            reads.append(f"residuals.{spec.residual_of(i)}")
        made = [path if path in outputs else f"{path}.img"]
        if block.makes_text:
            made.append(f"{path}.txt")
        chain.append(Call(path, _block(spec, block), tuple(reads), tuple(made), block=path))
        img, txt = made[0], made[-1]
    if spec.single_depth:
        chain.append(Call("join", _join(spec), (img, txt), ("join",)))
        tokens = "join"
        for i in range(spec.single_depth):
            path = f"single_blocks.{i}"
            modulation = _modulate(chain, spec, path, "single", SINGLE_MODULATIONS)
            made = [path if path in outputs else f"{path}.tokens"]
            reads = [tokens, modulation, *everywhere]
            chain.append(Call(path, _single_block(spec), tuple(reads), tuple(made), block=path))
            (tokens,) = made
        chain.append(Call("split", _split(spec), (tokens, "img_ids"), ("split",)))
        img = "split"
    final_modulation = Call(
        "final_modulation", _modulation(spec, 2), ("conditioning",), ("final_modulation",), modulates=True
    )
    chain.append(final_modulation)
    chain.append(Call("final", _final(spec), (img, "final_modulation"), ("sample",)))
    return tuple(chain)


_EVERYWHERE = ("cos", "sin", "attention_mask", "references")  # what every block reads, where the model has it


def _embedding(spec: ModelSpec) -> list[Call]:
    """The calls before the first block."""
    conditions = ["timestep"]
    if spec.pooled_dim:
        conditions.append("pooled_projections")
    if spec.guidance:
        conditions.append("guidance")
    img = ("hidden_states", "img_ids") if spec.pos_max_size else ("hidden_states",)
    chain = [
        Call("conditioning", _conditioning(spec), tuple(conditions), ("conditioning",)),
        Call("img_embed", _img_embed(spec), img, ("img_embed",)),
        Call("txt_embed", _txt_embed(spec), ("encoder_hidden_states",), ("txt_embed",)),
    ]
    if spec.rope_axes:
        chain.append(Call("positions", _positions(spec), ("img_ids", "txt_ids"), ("cos", "sin")))
    if spec.txt_mask:
        reads = ("encoder_hidden_states_mask", "img_ids")
        chain.append(Call("attention_mask", _attention_mask(spec), reads, ("attention_mask",)))
    if spec.still_references:
        chain.append(Call("references", _references(spec), ("img_ids",), ("references",)))
    if spec.residuals:
        made = tuple(f"residuals.{i}" for i in range(spec.residuals))
        chain.append(Call("residuals", _residuals(spec), ("block_controlnet_hidden_states",), made))
    return chain


def _modulate(chain: list[Call], spec: ModelSpec, block: str, stream: str, tensors: int) -> str:
    """The name of a block's modulation, after the call that makes it: its own, or the first of those that share it."""
    if spec.shared_modulation:
        path = f"shared_modulation.{stream}"
    elif stream == "single":
        path = block.replace("blocks", "modulations")
    else:
        path = f"{block.replace('blocks', 'modulations')}.{stream}"
    if all(call.path != path for call in chain):
        owner = None if spec.shared_modulation else block
        kind = _modulation(spec, tensors)
        chain.append(Call(path, kind, ("conditioning",), (path,), block=owner, modulates=True))
    return path


def _img(name: str, channels: int) -> TensorSpec:
    return TensorSpec(name, ("batch", "img_tokens", channels), "compute")


def _txt(name: str, channels: int) -> TensorSpec:
    return TensorSpec(name, ("batch", "txt_tokens", channels), "compute")


def _tokens(name: str, channels: int) -> TensorSpec:
    return TensorSpec(name, ("batch", TOKENS, channels), "compute")


def _per_sample(name: str, *sizes: int) -> TensorSpec:
    return TensorSpec(name, ("batch", *sizes), "compute")


def _scalar(name: str) -> TensorSpec:
    return TensorSpec(name, ("batch",), "float32")


def _ids(spec: ModelSpec, stream: str) -> TensorSpec:
    return TensorSpec(f"{stream}_ids", (f"{stream}_tokens", spec.id_axes), "float32")


def _angles(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, (TOKENS, spec.head_dim // 2), "float32") for name in ("cos", "sin"))


def _conditions(spec: ModelSpec, name: str, *sizes: int) -> TensorSpec:
    """What depends on the conditioning alone: a row per sample, and another at timestep 0 where references have it."""
    return TensorSpec(name, ("batch + batch" if spec.still_references else "batch", *sizes), "compute")


_REFERENCES = TensorSpec("references", ("img_tokens", 1), "bool")
_MASK = TensorSpec("attention_mask", ("batch", 1, 1, TOKENS), "compute")


def _read_everywhere(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    return (
        *(_angles(spec) if spec.rope_axes else ()),
        *((_MASK,) if spec.txt_mask else ()),
        *((_REFERENCES,) if spec.still_references else ()),
    )


def _conditioning(spec: ModelSpec) -> Kind:
    inputs = [_scalar("timestep")]
    if spec.pooled_dim:
        inputs.append(_per_sample("pooled_projections", spec.pooled_dim))
    if spec.guidance:
        inputs.append(_scalar("guidance"))
    return Kind(
        "MMDiTConditioning",
        lambda: Conditioning(spec),
        tuple(inputs),
        (_conditions(spec, "conditioning", spec.cond_dim),),
    )


def _img_embed(spec: ModelSpec) -> Kind:
    inputs = (_img("hidden_states", spec.img_dim), *((_ids(spec, "img"),) if spec.pos_max_size else ()))
    return Kind("MMDiTImageEmbed", lambda: ImageEmbed(spec), inputs, (_img("img", spec.width),))


def _txt_embed(spec: ModelSpec) -> Kind:
    return Kind(
        "MMDiTTextEmbed",
        lambda: TextEmbed(spec),
        (_txt("encoder_hidden_states", spec.txt_dim),),
        (_txt("txt", spec.width),),
    )


def _positions(spec: ModelSpec) -> Kind:
    ids = (_ids(spec, "img"), _ids(spec, "txt"))
    return Kind("MMDiTRotaryPositions", lambda: RotaryPositions(spec), ids, _angles(spec))


def _attention_mask(spec: ModelSpec) -> Kind:
    mask = TensorSpec("encoder_hidden_states_mask", ("batch", "txt_tokens"), "bool")
    return Kind("MMDiTAttentionMask", AttentionMask, (mask, _ids(spec, "img")), (_MASK,))


def _references(spec: ModelSpec) -> Kind:
    return Kind("MMDiTReferences", References, (_ids(spec, "img"),), (_REFERENCES,))


def _residuals(spec: ModelSpec) -> Kind:
    axes = (spec.residuals, "batch", "img_tokens", spec.width)
    return Kind(
        "MMDiTResiduals",
        Residuals,
        (TensorSpec("block_controlnet_hidden_states", axes, "compute"),),
        tuple(_img(f"residual_{i}", spec.width) for i in range(spec.residuals)),
    )


def _modulation(spec: ModelSpec, tensors: int) -> Kind:
    return Kind(
        f"MMDiTModulation{tensors}",
        lambda: Modulation(spec, tensors),
        (_conditions(spec, "conditioning", spec.cond_dim),),
        (_conditions(spec, "modulation", 1, tensors * spec.width),),
    )


def _block(spec: ModelSpec, block: BlockSpec) -> Kind:
    traits = {"Dual": block.dual_attention, "Residual": block.residual, "Last": not block.makes_text}
    outputs = (_img("img_out", spec.width), _txt("txt_out", spec.width))
    return Kind(
        f"MMDiT{''.join(name for name, has in traits.items() if has)}JointBlock",
        lambda: JointBlock(spec, block),
        (
            _img("hidden_states", spec.width),
            _txt("encoder_hidden_states", spec.width),
            _conditions(spec, "img_modulation", 1, block.img_modulations * spec.width),
            _conditions(spec, "txt_modulation", 1, block.txt_modulations * spec.width),
            *_read_everywhere(spec),
            *((_img("residual", spec.width),) if block.residual else ()),
        ),
        outputs if block.makes_text else outputs[:1],
    )


def _join(spec: ModelSpec) -> Kind:
    streams = (_img("img", spec.width), _txt("txt", spec.width))
    return Kind("MMDiTJoin", Join, streams, (_tokens("tokens", spec.width),))


def _single_block(spec: ModelSpec) -> Kind:
    modulation = _conditions(spec, "modulation", 1, SINGLE_MODULATIONS * spec.width)
    return Kind(
        "MMDiTSingleBlock",
        lambda: SingleBlock(spec),
        (_tokens("hidden_states", spec.width), modulation, *_read_everywhere(spec)),
        (_tokens("tokens_out", spec.width),),
    )


def _split(spec: ModelSpec) -> Kind:
    inputs = (_tokens("tokens", spec.width), _ids(spec, "img"))
    return Kind("MMDiTSplit", Split, inputs, (_img("img", spec.width),))


def _final(spec: ModelSpec) -> Kind:
    return Kind(
        "MMDiTFinalLayer",
        lambda: FinalLayer(spec),
        (_img("hidden_states", spec.width), _conditions(spec, "modulation", 1, 2 * spec.width)),
        (_img("sample", spec.out_dim),),
    )
