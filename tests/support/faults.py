"""Ways to break an engine, each with the call that is wrong first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.spec import PRECISIONS

_OTHER_SEED = 4  # of other weights than the bundles'


@dataclass(frozen=True)
class Fault:
    """What is wrong, and the first call of the model that is wrong by it.

    `family`: whose tiny model has it.
    `blind`: precisions at which these random weights keep the effect within the tolerance, block by block.
    `blind_replay`: the same for the final output alone, which is all that binds a block without its weights.
    """

    first: str
    change: Callable[[Any], None]
    in_graph: bool = False
    family: str = "sd3"
    blind: tuple[str, ...] = ()
    blind_replay: tuple[str, ...] = ()

    def tried(self, replay: bool) -> tuple[str, ...]:
        """Precisions at which it is planted."""
        return ("fp16",) if replay and self.family != "sd3" else tuple(PRECISIONS)

    def unseen(self, replay: bool) -> tuple[str, ...]:
        return self.blind_replay if replay else self.blind


def _swap(tensors: dict[str, Tensor], pairs: Mapping[str, str]) -> None:
    for a, b in pairs.items():
        tensors[a], tensors[b] = tensors[b], tensors[a]


def _swap_rows(tensors: dict[str, Tensor], module: str, parts: int, a: int, b: int) -> None:
    """Exchange two of the equal parts that a module's outputs are made of."""
    for leaf in _leaves(tensors, module):
        chunks = list(tensors[f"{module}.{leaf}"].chunk(parts))
        chunks[a], chunks[b] = chunks[b], chunks[a]
        tensors[f"{module}.{leaf}"] = torch.cat(chunks)


def _exchange(tensors: dict[str, Tensor], module: str, pairs: Mapping[str, str]) -> None:
    """Exchange all tensors of sub-modules, e.g. ``to_q`` and ``to_k``."""
    for a, b in pairs.items():
        for key in [k for k in tensors if k.startswith(f"{module}.{a}.")]:
            _swap(tensors, {key: key.replace(f"{module}.{a}.", f"{module}.{b}.")})


def _flip_exponent_bit(tensors: dict[str, Tensor], key: str) -> None:
    """The highest bit of the exponent of one weight: it becomes huge."""
    flat = tensors[key].reshape(-1)
    integer = {2: torch.int16, 4: torch.int32}[flat.dtype.itemsize]
    bits = flat[37:38].view(integer)
    bits ^= 1 << (8 * flat.dtype.itemsize - 2)


def _leaves(tensors: dict[str, Tensor], module: str) -> list[str]:
    return [leaf for leaf in ("weight", "bias") if f"{module}.{leaf}" in tensors]


def _zero(tensors: dict[str, Tensor], module: str) -> None:
    for leaf in _leaves(tensors, module):
        tensors[f"{module}.{leaf}"].zero_()


def _other_seed(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        tensors[key] = RandomWeights(_OTHER_SEED).part(Part(key, tuple(tensor.shape))).to(tensor.dtype)


def function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    """A function, or the variant of it that a quantized model has in its place."""
    return next(f for f in model.functions if f.name == name or f.name.startswith(f"{name}_"))


def _swap_split(model: onnx.ModelProto, name: str, value: str) -> None:
    """Exchange the first two parts that a function splits a value into: scale and shift."""
    split = next(n for n in function(model, name).node if n.op_type == "Split" and n.input[0] == value)
    split.output[0], split.output[1] = split.output[1], split.output[0]


def _drop_gate(model: onnx.ModelProto, name: str, value: str, part: int) -> None:
    """gate · x  ⇒  x, also where the residual is a named function; in emulated bf16 it is spelled out."""
    body = function(model, name).node
    gate = next(n for n in body if n.op_type == "Split" and n.input[0] == value).output[part]
    node = _reader(model, name, gate)
    if node.op_type == "Mul":
        _without(node, gate)
        return
    x, _, y = node.input
    assert node.op_type == "MMDiTGatedResidual"
    node.CopyFrom(onnx.helper.make_node("Add", [x, y], list(node.output)))


def _without(node: onnx.NodeProto, value: str) -> None:
    """op(x, value)  ⇒  x"""
    (rest,) = (v for v in node.input if v != value)
    node.CopyFrom(onnx.helper.make_node("Identity", [rest], list(node.output)))


def _before(model: onnx.ModelProto, name: str, value: str, op: str, constants: Sequence[onnx.TensorProto]) -> None:
    """Let a function read ``op(value, *constants)`` in the place of one of its inputs."""
    body = function(model, name)
    for node in body.node:
        for i, read in enumerate(node.input):
            if read == value:
                node.input[i] = f"{value}.changed"
    names = [f"{value}.constant{i}" for i in range(len(constants))]
    nodes = [
        *(onnx.helper.make_node("Constant", [], [n], value=t) for n, t in zip(names, constants, strict=True)),
        onnx.helper.make_node(op, [value, *names], [f"{value}.changed"], **({"axis": 1} if op == "Gather" else {})),
        *body.node,
    ]
    del body.node[:]
    body.node.extend(nodes)


def _int64(*values: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", onnx.TensorProto.INT64, [len(values)], values)


def _bool(value: bool) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", onnx.TensorProto.BOOL, [], [value])


def _float(value: float) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [], [value])


def _thousandth(model: onnx.ModelProto, scalar: str = "timestep") -> None:
    _before(model, "MMDiTConditioning", scalar, "Mul", [_float(1e-3)])


def _reverse(model: onnx.ModelProto, name: str, ids: str) -> None:
    constants = [_int64(-1), _int64(-(2**63)), _int64(0), _int64(-1)]
    _before(model, name, ids, "Slice", constants)


def _reader(model: onnx.ModelProto, name: str, value: str) -> onnx.NodeProto:
    """The first node of a function that reads a value."""
    return next(n for n in function(model, name).node if value in n.input)


def _swap_inputs(node: onnx.NodeProto | onnx.FunctionProto, a: int, b: int) -> None:
    node.input[a], node.input[b] = node.input[b], node.input[a]


def _swap_names(model: onnx.ModelProto, name: str, a: str, b: str) -> None:
    """Exchange two inputs of a function."""
    body = function(model, name)
    names = list(body.input)
    _swap_inputs(body, names.index(a), names.index(b))


def _attention(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in function(model, name).node if n.op_type == "MultiHeadAttention")


def _k_stays(model: onnx.ModelProto, name: str) -> None:
    """K as it was before RoPE, the first on the way back from the attention."""
    nodes = function(model, name).node
    producers = {value: n for n in nodes for value in n.output}
    rope = producers[_attention(model, name).input[1]]
    while rope.op_type != "RotaryEmbedding":
        rope = producers[rope.input[0]]
    for node in nodes:
        node.input[:] = [rope.input[0] if value == rope.output[0] else value for value in node.input]


def _no_mask(model: onnx.ModelProto, name: str) -> None:
    del _attention(model, name).input[3:]


def _mlp_before_attention(model: onnx.ModelProto) -> None:
    attended = _attention(model, "MMDiTSingleBlock").output[0]
    while (reader := _reader(model, "MMDiTSingleBlock", attended)).op_type == "Cast":
        (attended,) = reader.output
    _swap_inputs(reader, 0, 1)


def _swap_halves_of_swiglu(model: onnx.ModelProto) -> None:
    """In a single block, the MLP is the last part of what the projection is split into."""
    first = next(n for n in function(model, "MMDiTSingleBlock").node if n.op_type == "Split" and len(n.output) == 4)
    _swap_split(model, "MMDiTSingleBlock", first.output[3])


def _text_leaves_first(model: onnx.ModelProto) -> None:
    """Of joined tokens, the last N: what would be right, were text in front."""
    body = function(model, "MMDiTSplit")
    (cut,) = (n for n in body.node if n.op_type == "Slice")
    count, end = cut.input[2], "end"
    at = list(body.node).index(cut)
    body.node.insert(at, onnx.helper.make_node("Neg", [count], ["start"]))
    body.node.insert(at, onnx.helper.make_node("Constant", [], [end], value=_int64(2**63 - 1)))
    body.node[at + 2].input[1:3] = ["start", end]


_BLOCK0, _BLOCK1, _SINGLE1 = "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.1"
_STREAM, _MASK = "double_stream_modulation_{}.linear.weight", "encoder_hidden_states_mask"
_TO_TEXT = {"to_q": "add_q_proj", "to_k": "add_k_proj", "to_v": "add_v_proj", "to_out.0": "to_add_out"}
_Q_TO_K = {"to_q": "to_k", "add_q_proj": "add_k_proj", "norm_q": "norm_k", "norm_added_q": "norm_added_k"}
FAULTS: dict[str, Fault] = {
    "scale and shift swapped in the weights": Fault(
        "modulations.0.img", lambda t: _swap_rows(t, f"{_BLOCK0}.norm1.linear", 6, 0, 1)
    ),
    "scale and shift of the MLP swapped in the weights": Fault(
        "modulations.1.img", lambda t: _swap_rows(t, f"{_BLOCK1}.norm1.linear", 6, 3, 4)
    ),
    "scale and shift swapped in the graph": Fault(
        "blocks.0", lambda m: _swap_split(m, "MMDiTJointBlock", "img_modulation"), in_graph=True
    ),
    "order of the last text modulation in the weights": Fault(
        "modulations.1.txt", lambda t: _swap_rows(t, f"{_BLOCK1}.norm1_context.linear", 2, 0, 1)
    ),
    "order of the last text modulation in the graph": Fault(
        "blocks.1",
        lambda m: _swap_split(m, "MMDiTLastJointBlock", "txt_modulation"),
        in_graph=True,
        blind=("bf16",),
        blind_replay=("bf16",),
    ),
    "order of the final modulation in the graph": Fault(
        "final", lambda m: _swap_split(m, "MMDiTFinalLayer", "modulation"), in_graph=True
    ),
    "Q and K exchanged": Fault("blocks.1", lambda t: _exchange(t, f"{_BLOCK1}.attn", _Q_TO_K)),
    # Within a stream, scores hold the product of the two norms: only image with text differs.
    "norms of Q and K exchanged": Fault(
        "blocks.0",
        lambda t: _exchange(t, f"{_BLOCK0}.attn", {"norm_q": "norm_k"}),
        blind=("fp16", "bf16"),
        blind_replay=("fp16", "bf16"),
    ),
    "timestep without its factor of 1000": Fault("conditioning", _thousandth, in_graph=True),
    "rows and columns of img_ids exchanged": Fault(
        "img_embed",
        lambda m: _before(m, "MMDiTImageEmbed", "img_ids", "Gather", [_int64(1, 0)]),
        in_graph=True,
    ),
    "img_ids in reverse order": Fault("img_embed", lambda m: _reverse(m, "MMDiTImageEmbed", "img_ids"), in_graph=True),
    "gate of the attention dropped": Fault(
        "blocks.0", lambda m: _drop_gate(m, "MMDiTJointBlock", "img_modulation", 2), in_graph=True
    ),
    "gate of the text MLP dropped": Fault(
        "blocks.0",
        lambda m: _drop_gate(m, "MMDiTJointBlock", "txt_modulation", 5),
        in_graph=True,
        blind_replay=("bf16",),
    ),
    "streams exchanged": Fault("blocks.0", lambda t: _exchange(t, f"{_BLOCK0}.attn", _TO_TEXT)),
    "exponent bit flipped in a block": Fault(
        "blocks.1", lambda t: _flip_exponent_bit(t, f"{_BLOCK1}.ff.net.0.proj.weight")
    ),
    "exponent bit flipped at the end": Fault("final", lambda t: _flip_exponent_bit(t, "proj_out.weight")),
    "pooled text ignored": Fault("conditioning", lambda t: _zero(t, "time_text_embed.text_embedder.linear_2")),
    "blocks exchanged": Fault("blocks.0", lambda t: _exchange(t, "transformer_blocks", {"0.ff": "1.ff"})),
    "another seed": Fault("conditioning", _other_seed),
    "FLUX.1: guidance ignored": Fault(
        "conditioning", lambda t: _zero(t, "time_text_embed.guidance_embedder.linear_2"), family="flux1"
    ),
    "FLUX.1: guidance without its factor of 1000": Fault(
        "conditioning", lambda m: _thousandth(m, "guidance"), in_graph=True, family="flux1"
    ),
    "FLUX.1: timestep without its factor of 1000": Fault("conditioning", _thousandth, in_graph=True, family="flux1"),
    "FLUX.1: rows and columns of img_ids exchanged": Fault(
        "positions",
        lambda m: _before(m, "MMDiTRotaryPositions", "img_ids", "Gather", [_int64(0, 2, 1)]),
        in_graph=True,
        family="flux1",
    ),
    "FLUX.1: img_ids in reverse order": Fault(
        "positions", lambda m: _reverse(m, "MMDiTRotaryPositions", "img_ids"), in_graph=True, family="flux1"
    ),
    "FLUX.1: positions of text before those of the image": Fault(
        "positions",
        lambda m: _swap_inputs(_reader(m, "MMDiTRotaryPositions", "txt_ids"), 0, 1),
        in_graph=True,
        family="flux1",
    ),
    "FLUX.1: cos and sin exchanged in joint blocks": Fault(
        "blocks.0", lambda m: _swap_names(m, "MMDiTJointBlock", "cos", "sin"), in_graph=True, family="flux1"
    ),
    # A single block's one product adds attention and MLP: of random weights, attention is the smaller part.
    "FLUX.1: cos and sin exchanged in single blocks": Fault(
        "single_blocks.0",
        lambda m: _swap_names(m, "MMDiTSingleBlock", "cos", "sin"),
        in_graph=True,
        family="flux1",
        blind=("bf16",),
    ),
    "FLUX.1: K of joint blocks not turned": Fault(
        "blocks.0", lambda m: _k_stays(m, "MMDiTJointBlock"), in_graph=True, family="flux1"
    ),
    "FLUX.1: K of single blocks not turned": Fault(
        "single_blocks.0",
        lambda m: _k_stays(m, "MMDiTSingleBlock"),
        in_graph=True,
        family="flux1",
        blind=("bf16",),
    ),
    "FLUX.1: streams joined in the wrong order": Fault(
        "join", lambda m: _swap_inputs(_reader(m, "MMDiTJoin", "img"), 0, 1), in_graph=True, family="flux1"
    ),
    "FLUX.1: streams split in the wrong order": Fault("split", _text_leaves_first, in_graph=True, family="flux1"),
    "FLUX.1: Q and K of a single block exchanged": Fault(
        "single_blocks.1", lambda t: _exchange(t, f"{_SINGLE1}.attn", {"to_q": "to_k"}), family="flux1"
    ),
    "FLUX.1: MLP before attention in the projection out of single blocks": Fault(
        "single_blocks.0", _mlp_before_attention, in_graph=True, family="flux1"
    ),
    "FLUX.1: modulations of two single blocks exchanged": Fault(
        "single_modulations.1",
        lambda t: _exchange(t, "single_transformer_blocks", {"1.norm": "2.norm"}),
        family="flux1",
    ),
    "FLUX.2: guidance ignored": Fault(
        "conditioning", lambda t: _zero(t, "time_guidance_embed.guidance_embedder.linear_2"), family="flux2"
    ),
    "FLUX.2: txt_ids in reverse order": Fault(
        "positions", lambda m: _reverse(m, "MMDiTRotaryPositions", "txt_ids"), in_graph=True, family="flux2"
    ),
    "FLUX.2: the axes of txt_ids one further": Fault(
        "positions",
        lambda m: _before(m, "MMDiTRotaryPositions", "txt_ids", "Gather", [_int64(3, 0, 1, 2)]),
        in_graph=True,
        family="flux2",
    ),
    "FLUX.2: halves of a joint block's SwiGLU exchanged": Fault(
        "blocks.1", lambda t: _swap_rows(t, f"{_BLOCK1}.ff.linear_in", 2, 0, 1), family="flux2"
    ),
    "FLUX.2: halves of single blocks' SwiGLU exchanged": Fault(
        "single_blocks.0", _swap_halves_of_swiglu, in_graph=True, family="flux2"
    ),
    "FLUX.2: modulations of image and text exchanged": Fault(
        "shared_modulation.img",
        lambda t: _swap(t, {_STREAM.format("img"): _STREAM.format("txt")}),
        family="flux2",
    ),
    "Qwen-Image: mask ignored": Fault(
        "attention_mask",
        lambda m: _before(m, "MMDiTAttentionMask", _MASK, "Or", [_bool(True)]),
        in_graph=True,
        family="qwen-image",
    ),
    "Qwen-Image: mask inverted": Fault(
        "attention_mask",
        lambda m: _before(m, "MMDiTAttentionMask", _MASK, "Not", []),
        in_graph=True,
        family="qwen-image",
    ),
    # One or two of some twenty keys are masked.
    "Qwen-Image: mask not read in the last block": Fault(
        "blocks.1",
        lambda m: _no_mask(m, "MMDiTLastJointBlock"),
        in_graph=True,
        family="qwen-image",
        blind=("bf16",),
    ),
    "Qwen-Image: text not normed": Fault(
        "txt_embed",
        lambda m: _without(_reader(m, "MMDiTTextEmbed", "norm.weight"), "norm.weight"),
        in_graph=True,
        family="qwen-image",
    ),
    "Qwen-Image: txt_ids in reverse order": Fault(
        "positions", lambda m: _reverse(m, "MMDiTRotaryPositions", "txt_ids"), in_graph=True, family="qwen-image"
    ),
    "Qwen-Image-Edit-2511: references like the image that is made": Fault(
        "references",
        lambda m: _before(m, "MMDiTReferences", "img_ids", "Mul", [_float(0.0)]),
        in_graph=True,
        family="qwen-image-edit-2511",
    ),
    "ControlNet: residuals in reverse order": Fault(
        "residuals",
        lambda m: _reverse(m, "MMDiTResiduals", "block_controlnet_hidden_states"),
        in_graph=True,
        family="sd3-controlnet",
    ),
    "ControlNet: residuals not added": Fault(
        "blocks.0",
        lambda m: _without(_reader(m, "MMDiTResidualJointBlock", "residual"), "residual"),
        in_graph=True,
        family="sd3-controlnet",
    ),
}
