"""How the model's parameters are stored: canonical keys are diffusers' names and layouts.

A parameter that joins several canonical tensors (Q, K and V) is their concatenation along the first axis. The
weights file keeps those next to each other, so that the joined parameter is one span and costs no copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmdit_deploy.model import MMDiT
from mmdit_deploy.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """One canonical tensor: its key and its shape in the checkpoint."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, and the canonical tensors that it is made of.

    Args:
        path: its name in `MMDiT`, e.g. ``blocks.0.img.qkv.proj.weight``.
        shape: its shape in the model: the parts, reshaped to 2-D where it is 2-D, joined along the first axis.
        parts: the canonical tensors, in order.
    """

    path: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


# Our module path → diffusers' module paths, for SD3 and SD3.5 (SD3Transformer2DModel). `*` is the block's index.
SD3_KEYS: dict[str, tuple[str, ...]] = {
    "img_embed.proj": ("pos_embed.proj",),
    "img_embed.positions": ("pos_embed",),
    "txt_embed.proj": ("context_embedder",),
    "conditioning.time.up": ("time_text_embed.timestep_embedder.linear_1",),
    "conditioning.time.down": ("time_text_embed.timestep_embedder.linear_2",),
    "conditioning.pooled_up": ("time_text_embed.text_embedder.linear_1",),
    "conditioning.pooled_down": ("time_text_embed.text_embedder.linear_2",),
    "modulations.*.img.proj": ("transformer_blocks.*.norm1.linear",),
    "modulations.*.txt.proj": ("transformer_blocks.*.norm1_context.linear",),
    "final_modulation.proj": ("norm_out.linear",),
    "blocks.*.img.qkv.proj": tuple(f"transformer_blocks.*.attn.to_{x}" for x in "qkv"),
    "blocks.*.img.qkv.norm_q": ("transformer_blocks.*.attn.norm_q",),
    "blocks.*.img.qkv.norm_k": ("transformer_blocks.*.attn.norm_k",),
    "blocks.*.img.attn_out": ("transformer_blocks.*.attn.to_out.0",),
    "blocks.*.img.mlp.up": ("transformer_blocks.*.ff.net.0.proj",),
    "blocks.*.img.mlp.down": ("transformer_blocks.*.ff.net.2",),
    "blocks.*.img.qkv2.proj": tuple(f"transformer_blocks.*.attn2.to_{x}" for x in "qkv"),
    "blocks.*.img.qkv2.norm_q": ("transformer_blocks.*.attn2.norm_q",),
    "blocks.*.img.qkv2.norm_k": ("transformer_blocks.*.attn2.norm_k",),
    "blocks.*.img.attn2_out": ("transformer_blocks.*.attn2.to_out.0",),
    "blocks.*.txt.qkv.proj": tuple(f"transformer_blocks.*.attn.add_{x}_proj" for x in "qkv"),
    "blocks.*.txt.qkv.norm_q": ("transformer_blocks.*.attn.norm_added_q",),
    "blocks.*.txt.qkv.norm_k": ("transformer_blocks.*.attn.norm_added_k",),
    "blocks.*.txt.attn_out": ("transformer_blocks.*.attn.to_add_out",),
    "blocks.*.txt.mlp.up": ("transformer_blocks.*.ff_context.net.0.proj",),
    "blocks.*.txt.mlp.down": ("transformer_blocks.*.ff_context.net.2",),
    "final.proj": ("proj_out",),
}
# Leaves whose canonical name differs from ours.
SD3_LEAVES = {"img_embed.positions.table": "pos_embed"}

POSITION_TABLE = "pos_embed.pos_embed"  # in every SD3 checkpoint; a parameter only where it differs from the formula


def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of the weights file.

    All modulation weights come one after the other, then all their biases, so that one matrix product can make the
    modulations of all blocks and of the head, and a file without them is a contiguous cut.
    """
    with torch.device("meta"):
        model = MMDiT(spec)
    table = [_parameter(path, tuple(p.shape), spec) for path, p in model.named_parameters()]
    return tuple(sorted(table, key=_file_order))


def _file_order(parameter: Parameter) -> tuple[int, bool]:
    head = parameter.path.split(".")[0].replace("final_modulation", "modulations")
    stages = ("conditioning", "modulations", "img_embed", "txt_embed", "blocks", "final")
    return stages.index(head), head == "modulations" and parameter.path.endswith(".bias")


def _parameter(path: str, shape: tuple[int, ...], spec: ModelSpec) -> Parameter:
    module, _, leaf = path.rpartition(".")
    steps = module.split(".")
    index = next((s for s in steps if s.isdecimal()), "")
    pattern = ".".join("*" if s.isdecimal() else s for s in steps)
    names = [f"{m.replace('*', index)}.{SD3_LEAVES.get(path, leaf)}" for m in SD3_KEYS[pattern]]
    part_shape = (shape[0] // len(names), *shape[1:])
    if path == "img_embed.proj.weight":  # a convolution over the patch, (channel, row, column) like our tokens
        part_shape = (spec.width, spec.latent_channels, spec.patch_size, spec.patch_size)
    elif path == "img_embed.positions.table":
        part_shape = (1, *shape)
    return Parameter(path, shape, tuple(Part(name, part_shape) for name in names))
