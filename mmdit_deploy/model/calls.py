"""The model as a chain of calls of pure functions: what the graph assembles and what verification steps through.

`MMDiT.forward` is the same chain, written for people; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdit_deploy.model import kinds
from mmdit_deploy.model.kinds import Kind
from mmdit_deploy.model.mmdit import check_block
from mmdit_deploy.model.modulation import SINGLE_MODULATIONS
from mmdit_deploy.spec import ModelSpec


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
        chain.append(Call(path, kinds.joint_block(spec, block), tuple(reads), tuple(made), block=path))
        img, txt = made[0], made[-1]
    if spec.single_depth:
        chain.append(Call("join", kinds.join(spec), (img, txt), ("join",)))
        tokens = "join"
        for i in range(spec.single_depth):
            path = f"single_blocks.{i}"
            modulation = _modulate(chain, spec, path, "single", SINGLE_MODULATIONS)
            made = [path if path in outputs else f"{path}.tokens"]
            reads = [tokens, modulation, *everywhere]
            chain.append(Call(path, kinds.single_block(spec), tuple(reads), tuple(made), block=path))
            (tokens,) = made
        chain.append(Call("split", kinds.split(spec), (tokens, "img_ids"), ("split",)))
        img = "split"
    final_modulation = Call(
        "final_modulation", kinds.modulation(spec, 2), ("conditioning",), ("final_modulation",), modulates=True
    )
    chain.append(final_modulation)
    chain.append(Call("final", kinds.final(spec), (img, "final_modulation"), ("sample",)))
    return tuple(chain)


def conditioning_calls(chain: Sequence[Call]) -> tuple[Call, ...]:
    """The calls that depend on the timestep, the guidance and the pooled text alone, and on no token.

    They make the conditioning vector, and of it all modulation tensors. What the first of them reads of the caller is
    what they all depend on.
    """
    first = next(call for call in chain if call.path == _CONDITIONING)
    known, found = set(first.inputs), []
    for call in chain:
        if known.issuperset(call.inputs):
            known.update(call.outputs)
            found.append(call)
    return tuple(found)


_CONDITIONING = "conditioning"
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
        Call(_CONDITIONING, kinds.conditioning(spec), tuple(conditions), ("conditioning",)),
        Call("img_embed", kinds.img_embed(spec), img, ("img_embed",)),
        Call("txt_embed", kinds.txt_embed(spec), ("encoder_hidden_states",), ("txt_embed",)),
    ]
    if spec.rope_axes:
        chain.append(Call("positions", kinds.positions(spec), ("img_ids", "txt_ids"), ("cos", "sin")))
    if spec.txt_mask:
        reads = ("encoder_hidden_states_mask", "img_ids")
        chain.append(Call("attention_mask", kinds.attention_mask(spec), reads, ("attention_mask",)))
    if spec.still_references:
        chain.append(Call("references", kinds.references(spec), ("img_ids",), ("references",)))
    if spec.residuals:
        made = tuple(f"residuals.{i}" for i in range(spec.residuals))
        chain.append(Call("residuals", kinds.residuals(spec), ("block_controlnet_hidden_states",), made))
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
        kind = kinds.modulation(spec, tensors)
        chain.append(Call(path, kind, ("conditioning",), (path,), block=owner, modulates=True))
    return path
