"""Words for the values of a fused function: names such as ``add_226`` tell a reader nothing.

add_226     residual stream of the image, after img.attn_out
linear_4    product of img.mlp.down
cat_2       V of all tokens
"""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.graph.named_functions import GATED_RESIDUAL, MODULATE
from mmdit_deploy.graph.precision.wide_values import is_parameter

_STREAMS = {
    "hidden_states": "residual stream of the image, entering",
    "encoder_hidden_states": "residual stream of the text, entering",
    "img_out": "residual stream of the image, leaving",
    "txt_out": "residual stream of the text, leaving",
    "tokens_out": "residual stream, leaving",
    "img": "residual stream of the image",
    "txt": "residual stream of the text",
    "tokens": "residual stream",
}
_PRODUCTS = ("MatMul", "Gemm")
_MOVES = ("Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Cast")
_MODULATED = {1: "scale", 2: "shift"}
_LONGEST = 60  # characters: what is made of many values is called after its node


def labels(function: ir.Function) -> dict[str, str]:
    """What each float value of a fused function is, by its name."""
    words = _Words(function)
    values = [*function.inputs, *(v for node in function for v in node.outputs)]
    return {v.name: words.of(v) for v in values if v.name and v.dtype is not None and v.dtype.is_floating_point()}


class _Words:
    def __init__(self, function: ir.Function):
        self._outputs = {v.name for v in function.outputs}
        self._one_stream = all(v.name != "encoder_hidden_states" for v in function.inputs)
        self._has_streams = any(n.op_type in (GATED_RESIDUAL, "LayerNormalization") for n in function)

    def of(self, value: ir.Value) -> str:
        name, node = value.name or "", value.producer()
        if node is None or name in self._outputs:
            if node is None and not self._has_streams:
                return name.replace("_", " ")
            if self._one_stream and name == "hidden_states":
                return "residual stream, entering"
            return _STREAMS.get(name, name.replace("_", " "))
        if linear := linear_of(value):
            return f"product of {linear}"
        if node.op_type == GATED_RESIDUAL:
            return f"{self._stream(node.inputs[0])}, after {linear_of(node.inputs[2]) or 'attention'}"
        if node.op_type == MODULATE:
            return f"modulated norm, input of {', '.join(_linears_behind(value)) or 'what follows'}"
        if node.op_type == "RMSNormalization":
            weight = node.inputs[1]
            return "norm " + ((weight.name if weight is not None else None) or "").removesuffix(".weight")
        if node.op_type == "LayerNormalization":
            return f"norm of the {self._stream(node.inputs[0])}"
        if node.op_type == "Attention":
            return "attention's output"
        label = self._modulation(value) or self._moved(value, node)
        return label if len(label) <= _LONGEST else f"{node.op_type.lower()} {name}"

    def _stream(self, value: ir.Value | None) -> str:
        """Whose residual stream a value is in."""
        while value is not None and (node := value.producer()) is not None:
            value = node.inputs[0]
        whole = self.of(value) if value is not None else "value"
        return whole.removesuffix(", entering")

    def _modulation(self, value: ir.Value) -> str | None:
        for user, index in value.uses():
            if user.op_type == MODULATE and index in _MODULATED:
                return f"{_MODULATED[index]} for {', '.join(_linears_behind(user.outputs[0])) or 'a norm'}"
            if user.op_type == GATED_RESIDUAL and index == 1:
                return f"gate of {linear_of(user.inputs[2]) or 'a residual'}"
        return None

    def _moved(self, value: ir.Value, node: ir.Node) -> str:
        sources = [v for v in node.inputs if v is not None and not is_parameter(v)]
        if not sources:
            return f"{node.op_type.lower()} of parameters"
        role = _role(value)
        if node.op_type == "Concat":
            return f"{role} of all tokens" if role else " and ".join(self.of(v) for v in sources)
        if node.op_type == "Split":
            part = role or f"part {list(node.outputs).index(value)}"
            return f"{part} of {self._whole(sources[0])}"
        if node.op_type in _MOVES:
            return f"part of {self.of(sources[0])}" if node.op_type == "Slice" else self.of(sources[0])
        return f"{node.op_type.removeprefix('MMDiT').lower()} of {self.of(sources[0])}"

    def _whole(self, source: ir.Value) -> str:
        return (linear_of(source) or self.of(source)).removesuffix(".proj")


def linear_of(value: ir.Value | None) -> str | None:
    """The linear layer whose product a value is, by its path in the function, its bias added or not."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Add", "Mul") and sum(not is_parameter(v) for v in node.inputs) == 1:
        before = next(v for v in node.inputs if not is_parameter(v))
        node = before.producer() if before is not None else None
    if node is None or node.op_type not in _PRODUCTS:
        return None
    weight = node.inputs[1]
    while weight is not None and (producer := weight.producer()) is not None and producer.inputs:
        weight = producer.inputs[0]
    return weight.name.removesuffix(".weight") if weight is not None and weight.name and is_parameter(weight) else None


def _linears_behind(value: ir.Value) -> list[str]:
    """The linear layers that read a value."""
    found = []
    for user, _ in value.uses():
        ends = [user.outputs[0], *(n.outputs[0] for n, _ in user.outputs[0].uses())]
        found += [linear for end in ends if user.op_type in _PRODUCTS and (linear := linear_of(end))][:1]
    return found


def _role(value: ir.Value, depth: int = 8) -> str | None:
    """Which of an attention's operands a value becomes."""
    for user, index in value.uses():
        if user.op_type == "Attention" and index < 3:
            return "QKV"[index]
        follows = (*_MOVES, "Concat", "RMSNormalization", "RotaryEmbedding")
        data = index == 0 or user.op_type == "Concat"
        if depth and data and user.op_type in follows and (role := _role(user.outputs[0], depth - 1)):
            return role
    return None
