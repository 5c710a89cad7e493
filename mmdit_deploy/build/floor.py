"""The floor: what a block must read and write at least, and the FLOPs that it must do, from the spec alone.

A kernel may keep a tile on the chip, but not the tokens of a stream (25 MB an activation of SD3-Medium, batch 2, 1024
px), so what one product makes and another takes whole goes through memory: every row of it is needed, and no SM has
them all. The products and the attention are therefore kernels of their own, and between them:

    QKV        reads x, W             writes Q, K, V
    attention  reads Q, K, V          writes O
    out        reads O, residual, W   writes x
    up         reads x, W             writes the hidden activations
    down       reads them, residual, W   writes x

All else is counted as free: norms, modulation, rotation, activations, gates and residual sums ride along in the
prologue or the epilogue of a product (a norm needs all of a row before it scales the first channel, so an ideal
prologue reads it twice, and the second time out of a cache). Streams that do not wait for each other may share a
kernel: a second attention's QKV reads x once with the first's, and both outputs are summed up at once. What is not
needed is not counted: the text's queries, where no text goes on.

A plan of quantization changes what these bytes are: weights are read as they are stored, with their scales, Q, K and V
of an attention in FP8 are written and read in FP8, and O and the hidden activations in what the product after them is
quantized to. x is the residual stream, before its norm: it stays in the compute type, and what a plan keeps in fp32 is
counted so too.

Each weight is read once, a modulation, mask and table of angles once a block. It is bytes between kernels and memory,
as `build/traffic.py` counts them too; a GPU whose L2 cache holds a stream reads less from its DRAM, in both counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdit_deploy.precision import PrecisionPlan, Scheme
from mmdit_deploy.spec import BlockSpec, ModelSpec

_ANGLE = 4  # bytes: cosines and sines are fp32
_FLAG = 1  # byte: which tokens are those of references
_SINGLE_MODULATIONS = 3  # shift, scale, gate
_E4M3 = 8  # bits
_BITS = {"fp8": 8, "int8": 8, "fp4": 4, "int4": 4}


@dataclass(frozen=True)
class Floor:
    """The least that a block moves and computes.

    Args:
        nbytes: read and written.
        flops: of matrix products; a multiply-add is two.
    """

    nbytes: int
    flops: int

    def to_json(self) -> dict[str, int]:
        return {"bytes": self.nbytes, "flops": self.flops}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Floor:
        """Read what `to_json` wrote."""
        return Floor(data["bytes"], data["flops"])


@dataclass(frozen=True)
class _Work:
    """A sum of kernels' work: bits moved, and FLOPs."""

    bits: int = 0
    flops: int = 0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.bits + other.bits, self.flops + other.flops)


def floors(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    element: int,
    calls: Collection[str] | None = None,
    plan: PrecisionPlan | None = None,
) -> dict[str, Floor]:
    """The floor of every block.

    Args:
        sizes: of the axes ``batch``, ``img_tokens`` and ``txt_tokens``.
        element: bytes of the compute type.
        calls: leave out all other blocks.
        plan: what is quantized; nothing where there is none.

    Returns:
        By call, e.g. ``blocks.0``, ``single_blocks.3``.
    """
    wanted = [call for call in spec.block_names if calls is None or call in calls]
    made = {}
    for call in wanted:
        kind, _, index = call.partition(".")
        types = _Types.of(call, 8 * element, plan)
        if kind == "blocks":
            made[call] = _joint(spec, spec.blocks[int(index)], sizes, types)
        else:
            made[call] = _single(spec, sizes, types)
    return made


@dataclass(frozen=True)
class _Types:
    """What is in which format in one block.

    Args:
        element: bits of the compute type.
        schemes: of its quantized layers, by path in the block.
        fp8_attentions: how many, from the first on.
    """

    element: int
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    fp8_attentions: int = 0

    @staticmethod
    def of(call: str, element: int, plan: PrecisionPlan | None) -> _Types:
        if plan is None:
            return _Types(element)
        own = {
            p.removeprefix(f"{call}."): linear.scheme for p, linear in plan.linears.items() if p.startswith(f"{call}.")
        }
        return _Types(element, own, len(plan.attentions.get(call, ())))

    def weight(self, layer: str, k: int, n: int) -> int:
        """Bits of a layer's weight [n, k] and its scales, but for single numbers."""
        scheme = self.schemes.get(layer)
        if scheme is None:
            return k * n * self.element
        if scheme.block is None:
            factors = n + (k if scheme.smooth else 0)
            return k * n * _BITS[scheme.weights] + factors * self.element
        return k * n * _BITS[scheme.weights] + k * n // scheme.block * (
            _E4M3 if scheme.weights == "fp4" else self.element
        )

    def input(self, layer: str, elements: int) -> int:
        """Bits of what a layer reads, as what is before it can write it; scales by token are counted as nothing."""
        scheme = self.schemes.get(layer)
        if scheme is None or scheme.activations == "none":
            return elements * self.element
        scales = elements // scheme.block * _E4M3 if scheme.block else 0
        return elements * _BITS[scheme.weights] + scales

    def heads(self, attention: int) -> int:
        """Bits of a number of Q, K or V."""
        return _E4M3 if attention < self.fp8_attentions else self.element


def _joint(spec: ModelSpec, block: BlockSpec, sizes: Mapping[str, int], types: _Types) -> Floor:
    batch, img, txt = sizes["batch"], sizes["img_tokens"], sizes["txt_tokens"]
    outputs = {"img.attn_out": img} | ({"txt.attn_out": txt} if block.makes_text else {})
    work = _stream(spec, "img", batch * img, types, ends=False)
    work += _stream(spec, "txt", batch * txt, types, ends=not block.makes_text)
    work += _attention(spec, batch, outputs, img + txt, types, 0)
    # image tokens at timestep 0 have modulations of their own; what reads the text without going on needs two
    modulations = block.img_modulations * (2 if spec.still_references else 1)
    modulations += block.txt_modulations if block.makes_text else 2
    if block.dual_attention:
        work += _second_attention(spec, batch, img, types)
    if block.residual:
        work += _Work(batch * img * spec.width * types.element)
    return _floor(spec, work, modulations, sizes, types)


def _single(spec: ModelSpec, sizes: Mapping[str, int], types: _Types) -> Floor:
    batch, tokens = sizes["batch"], sizes["img_tokens"] + sizes["txt_tokens"]
    rows, width, hidden = batch * tokens, spec.width, spec.mlp_width
    # one product into Q, K, V and the MLP's hidden activations, one out of both, with the residual
    work = _product(spec, "proj", types, rows, width, 3 * width + _up_width(spec))
    work += _Work(rows * width * types.element)
    work += _Work(rows * 3 * width * types.heads(0) + types.input("out", rows * hidden))
    work += _head_norms(spec, types)
    work += _attention(spec, batch, {"out": tokens}, tokens, types, 0)
    work += _product(spec, "out", types, rows, width + hidden, width)
    work += _Work(types.input("out", rows * (width + hidden)) + 2 * rows * width * types.element)
    return _floor(spec, work, _SINGLE_MODULATIONS, sizes, types)


def _stream(spec: ModelSpec, name: str, rows: int, types: _Types, *, ends: bool) -> _Work:
    """A stream's products. One that ends gives the attention its keys and values, and no more."""
    width, hidden = spec.width, spec.mlp_width
    x = rows * width * types.element
    of_heads = 2 if ends else 3
    work = _product(spec, f"{name}.qkv.proj", types, rows, width, of_heads * width)
    work += _Work(x + of_heads * rows * width * types.heads(0)) + _head_norms(spec, types, of_heads - 1)
    if ends:
        return work
    work += _product(spec, f"{name}.attn_out", types, rows, width, width)
    work += _Work(types.input(f"{name}.attn_out", rows * width) + 2 * x)
    between = types.input(f"{name}.mlp.down", rows * hidden)
    work += _product(spec, f"{name}.mlp.up", types, rows, width, _up_width(spec)) + _Work(x + between)
    return work + _product(spec, f"{name}.mlp.down", types, rows, hidden, width) + _Work(between + 2 * x)


def _second_attention(spec: ModelSpec, batch: int, img: int, types: _Types) -> _Work:
    """The image stream's attention over itself: x is read, and the sum written, with the first's."""
    rows, width = batch * img, spec.width
    work = _product(spec, "img.qkv2.proj", types, rows, width, 3 * width)
    work += _Work(3 * rows * width * types.heads(1)) + _head_norms(spec, types)
    work += _attention(spec, batch, {"img.attn2_out": img}, img, types, 1)
    work += _product(spec, "img.attn2_out", types, rows, width, width)
    return work + _Work(types.input("img.attn2_out", rows * width))


def _product(spec: ModelSpec, layer: str, types: _Types, rows: int, k: int, n: int) -> _Work:
    """[rows, k] · [k, n]: its weights, bias and FLOPs."""
    bias = n * types.element if spec.bias else 0
    return _Work(types.weight(layer, k, n) + bias, 2 * rows * k * n)


def _attention(spec: ModelSpec, batch: int, outputs: Mapping[str, int], keys: int, types: _Types, index: int) -> _Work:
    """Reads Q, K and V, writes O: so many tokens for the layer that reads them."""
    queries = sum(outputs.values())
    read = batch * spec.width * (queries + 2 * keys) * types.heads(index)
    written = sum(types.input(layer, batch * spec.width * tokens) for layer, tokens in outputs.items())
    return _Work(read + written, 4 * batch * spec.width * queries * keys)


def _head_norms(spec: ModelSpec, types: _Types, norms: int = 2) -> _Work:
    return _Work(norms * spec.head_dim * types.element if spec.qk_norm else 0)


def _up_width(spec: ModelSpec) -> int:
    """What an MLP's first product makes: SwiGLU has a gate beside each value, and leaves one of the two."""
    return spec.mlp_width * (2 if spec.activation == "swiglu" else 1)


def _floor(spec: ModelSpec, work: _Work, modulations: int, sizes: Mapping[str, int], types: _Types) -> Floor:
    """With what the block reads besides tokens and weights: modulations, angles, mask, and which are references."""
    batch, tokens = sizes["batch"], sizes["img_tokens"] + sizes["txt_tokens"]
    elements = batch * modulations * spec.width
    elements += batch * tokens if spec.txt_mask else 0
    angles = tokens * spec.head_dim * _ANGLE if spec.rope_axes else 0
    flags = sizes["img_tokens"] * _FLAG if spec.still_references else 0
    return Floor((work.bits + elements * types.element + 7) // 8 + angles + flags, work.flops)
