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

Each weight is read once, a modulation, mask and table of angles once a block. It is bytes between kernels and memory,
as `build/traffic.py` counts them too; a GPU whose L2 cache holds a stream reads less from its DRAM, in both counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mmdit_deploy.spec import BlockSpec, ModelSpec

_ANGLE = 4  # bytes: cosines and sines are fp32
_FLAG = 1  # byte: which tokens are those of references
_SINGLE_MODULATIONS = 3  # shift, scale, gate


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
    """A sum of kernels' work: elements of activations and of weights, and FLOPs."""

    activations: int = 0
    weights: int = 0
    flops: int = 0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.activations + other.activations, self.weights + other.weights, self.flops + other.flops)


def floors(
    spec: ModelSpec, sizes: Mapping[str, int], element: int, calls: Collection[str] | None = None
) -> dict[str, Floor]:
    """The floor of every block.

    Args:
        sizes: of the axes ``batch``, ``img_tokens`` and ``txt_tokens``.
        element: bytes of the compute type.
        calls: leave out all other blocks.

    Returns:
        By call, e.g. ``blocks.0``, ``single_blocks.3``.
    """
    made = [_joint(spec, block, sizes, element) for block in spec.blocks]
    made += [_single(spec, sizes, element)] * spec.single_depth
    return {call: floor for call, floor in zip(spec.block_names, made, strict=True) if calls is None or call in calls}


def _joint(spec: ModelSpec, block: BlockSpec, sizes: Mapping[str, int], element: int) -> Floor:
    batch, img, txt = sizes["batch"], sizes["img_tokens"], sizes["txt_tokens"]
    queries = img + (txt if block.makes_text else 0)
    work = _stream(spec, batch * img, ends=False) + _stream(spec, batch * txt, ends=not block.makes_text)
    work += _attention(spec, batch, queries, img + txt)
    # image tokens at timestep 0 have modulations of their own; what reads the text without going on needs two
    modulations = block.img_modulations * (2 if spec.still_references else 1)
    modulations += block.txt_modulations if block.makes_text else 2
    if block.dual_attention:
        work += _second_attention(spec, batch, img)
    if block.residual:
        work += _Work(activations=batch * img * spec.width)
    return _floor(spec, work, modulations, sizes, element)


def _single(spec: ModelSpec, sizes: Mapping[str, int], element: int) -> Floor:
    batch, tokens = sizes["batch"], sizes["img_tokens"] + sizes["txt_tokens"]
    rows, width, hidden = batch * tokens, spec.width, spec.mlp_width
    # one product into Q, K, V and the MLP's hidden activations, one out of both, with the residual
    work = _product(spec, rows, width, 3 * width + _up_width(spec), writes=3 * width + hidden)
    work += _head_norms(spec)
    work += _attention(spec, batch, tokens, tokens)
    work += _product(spec, rows, width + hidden, width, writes=width, adds=width)
    return _floor(spec, work, _SINGLE_MODULATIONS, sizes, element)


def _stream(spec: ModelSpec, rows: int, *, ends: bool) -> _Work:
    """A stream's products. One that ends gives the attention its keys and values, and no more."""
    width, hidden = spec.width, spec.mlp_width
    if ends:
        return _product(spec, rows, width, 2 * width, writes=2 * width) + _head_norms(spec, 1)
    work = _product(spec, rows, width, 3 * width, writes=3 * width) + _head_norms(spec)
    work += _product(spec, rows, width, width, writes=width, adds=width)
    work += _product(spec, rows, width, _up_width(spec), writes=hidden)
    return work + _product(spec, rows, hidden, width, writes=width, adds=width)


def _second_attention(spec: ModelSpec, batch: int, img: int) -> _Work:
    """The image stream's attention over itself: x is read, and the sum written, with the first's."""
    rows, width = batch * img, spec.width
    work = _product(spec, rows, width, 3 * width, writes=3 * width) + _head_norms(spec)
    work += _attention(spec, batch, img, img)
    work += _product(spec, rows, width, width, writes=0)
    return work + _Work(activations=-rows * width)


def _product(spec: ModelSpec, rows: int, k: int, n: int, *, writes: int, adds: int = 0) -> _Work:
    """[rows, k] · [k, n], of which `writes` columns are left after its epilogue, which reads `adds` more."""
    return _Work(rows * (k + writes + adds), k * n + (n if spec.bias else 0), 2 * rows * k * n)


def _attention(spec: ModelSpec, batch: int, queries: int, keys: int) -> _Work:
    return _Work(batch * spec.width * 2 * (queries + keys), 0, 4 * batch * spec.width * queries * keys)


def _head_norms(spec: ModelSpec, norms: int = 2) -> _Work:
    return _Work(weights=norms * spec.head_dim if spec.qk_norm else 0)


def _up_width(spec: ModelSpec) -> int:
    """What an MLP's first product makes: SwiGLU has a gate beside each value, and leaves one of the two."""
    return spec.mlp_width * (2 if spec.activation == "swiglu" else 1)


def _floor(spec: ModelSpec, work: _Work, modulations: int, sizes: Mapping[str, int], element: int) -> Floor:
    """With what the block reads besides tokens and weights: modulations, angles, mask, and which are references."""
    batch, tokens = sizes["batch"], sizes["img_tokens"] + sizes["txt_tokens"]
    elements = work.activations + work.weights + batch * modulations * spec.width
    elements += batch * tokens if spec.txt_mask else 0
    angles = tokens * spec.head_dim * _ANGLE if spec.rope_axes else 0
    flags = sizes["img_tokens"] * _FLAG if spec.still_references else 0
    return Floor(elements * element + angles + flags, work.flops)
