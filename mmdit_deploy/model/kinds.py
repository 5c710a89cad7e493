"""The kinds of calls that a model is made of: pure functions of (activations, weights), each with its tensors.

The functions below say, for a spec, what each reads and makes; what a model has and what not, `calls` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from mmdit_deploy.contract import TOKENS, TensorSpec
from mmdit_deploy.model.blocks import JointBlock, SingleBlock
from mmdit_deploy.model.embeddings import (
    AttentionMask,
    Conditioning,
    ImageEmbed,
    References,
    Residuals,
    RotaryPositions,
    TextEmbed,
)
from mmdit_deploy.model.head import FinalLayer, Join, Split
from mmdit_deploy.model.modulation import SINGLE_MODULATIONS, Modulation
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


def conditioning(spec: ModelSpec) -> Kind:
    """The conditioning vector, from the timestep and, where the model has them, pooled text and guidance."""
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


def img_embed(spec: ModelSpec) -> Kind:
    """Image tokens, projected; with positions where the model adds them."""
    inputs = (_img("hidden_states", spec.img_dim), *((_ids(spec, "img"),) if spec.pos_max_size else ()))
    return Kind("MMDiTImageEmbed", lambda: ImageEmbed(spec), inputs, (_img("img", spec.width),))


def txt_embed(spec: ModelSpec) -> Kind:
    """Text tokens, projected."""
    return Kind(
        "MMDiTTextEmbed",
        lambda: TextEmbed(spec),
        (_txt("encoder_hidden_states", spec.txt_dim),),
        (_txt("txt", spec.width),),
    )


def positions(spec: ModelSpec) -> Kind:
    """Cosines and sines of RoPE's angles."""
    ids = (_ids(spec, "img"), _ids(spec, "txt"))
    return Kind("MMDiTRotaryPositions", lambda: RotaryPositions(spec), ids, _angles(spec))


def attention_mask(spec: ModelSpec) -> Kind:
    """What is added to the scores of keys."""
    mask = TensorSpec("encoder_hidden_states_mask", ("batch", "txt_tokens"), "bool")
    return Kind("MMDiTAttentionMask", AttentionMask, (mask, _ids(spec, "img")), (_MASK,))


def references(spec: ModelSpec) -> Kind:
    """Which image tokens are those of references."""
    return Kind("MMDiTReferences", References, (_ids(spec, "img"),), (_REFERENCES,))


def residuals(spec: ModelSpec) -> Kind:
    """A ControlNet's residuals, one by one."""
    axes = (spec.residuals, "batch", "img_tokens", spec.width)
    return Kind(
        "MMDiTResiduals",
        Residuals,
        (TensorSpec("block_controlnet_hidden_states", axes, "compute"),),
        tuple(_img(f"residual_{i}", spec.width) for i in range(spec.residuals)),
    )


def modulation(spec: ModelSpec, tensors: int) -> Kind:
    """Modulation tensors, so many, of one stream."""
    return Kind(
        f"MMDiTModulation{tensors}",
        lambda: Modulation(spec, tensors),
        (_conditions(spec, "conditioning", spec.cond_dim),),
        (_conditions(spec, "modulation", 1, tensors * spec.width),),
    )


def joint_block(spec: ModelSpec, block: BlockSpec) -> Kind:
    """A joint block; each structure has a function of its own."""
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


def join(spec: ModelSpec) -> Kind:
    """Both streams as one."""
    streams = (_img("img", spec.width), _txt("txt", spec.width))
    return Kind("MMDiTJoin", Join, streams, (_tokens("tokens", spec.width),))


def single_block(spec: ModelSpec) -> Kind:
    """A single block."""
    modulation = _conditions(spec, "modulation", 1, SINGLE_MODULATIONS * spec.width)
    return Kind(
        "MMDiTSingleBlock",
        lambda: SingleBlock(spec),
        (_tokens("hidden_states", spec.width), modulation, *_read_everywhere(spec)),
        (_tokens("tokens_out", spec.width),),
    )


def split(spec: ModelSpec) -> Kind:
    """The image tokens of joined ones."""
    inputs = (_tokens("tokens", spec.width), _ids(spec, "img"))
    return Kind("MMDiTSplit", Split, inputs, (_img("img", spec.width),))


def final(spec: ModelSpec) -> Kind:
    """The head."""
    return Kind(
        "MMDiTFinalLayer",
        lambda: FinalLayer(spec),
        (_img("hidden_states", spec.width), _conditions(spec, "modulation", 1, 2 * spec.width)),
        (_img("sample", spec.out_dim),),
    )
