"""Which values and nodes of a function are fp32, when some values are to be.

    img ─ LayerNorm ─ Modulate ─ MatMul ─ …             img and sum are to be fp32:
     └──────────────── GatedResidual ─ sum ─ …          LayerNorm, Modulate and GatedResidual are computed in fp32

What reads an fp32 value is computed in fp32, and so is what makes one. What comes of it is in 16 bit again, but for:

- a norm's result that only modulates read: Modulate reads it as it is, and comes back to 16 bit behind it
- the same numbers in another shape, or what is counted from them to quantize them
- a product before its bias and its scales by channel and by token

What only moves numbers that are in 16 bit stays in 16 bit. Attention is never computed in fp32, which TensorRT-RTX has
no fused kernel for: where Q, K or V are fp32 it is computed in bf16, which holds what fp32 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import onnx_ir as ir

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.named_functions import FP8_ATTENTION, FP8_MASKED_ATTENTION, MODULATE

SIXTEEN_BIT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FP16_MAX = 65504.0

_SAME_NUMBERS = frozenset("Expand Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())
_MOVES = _SAME_NUMBERS | frozenset("Concat Gather Slice Split Where".split())
_COUNTED = frozenset("Abs Div Max Min Mul ReduceMax".split())  # with parameters: what quantization is made of
_QUANTIZATION = frozenset(("QuantizeLinear", "DequantizeLinear"))
_PRODUCTS = frozenset(("Gemm", "MatMul"))
_NORMS = frozenset(("LayerNormalization", "RMSNormalization"))
_ATTENTIONS = ("Attention", FP8_ATTENTION, FP8_MASKED_ATTENTION)
_UNTOUCHED = frozenset("Cast Constant Shape Size".split())  # any type will do


@dataclass(frozen=True)
class Islands:
    """What is fp32 in a function.

    Args:
        values: those that stay in fp32 between nodes.
        nodes: those that are computed in fp32.
        bf16: attentions that are computed in bf16.
        clips: to fp16's range, of values that need none.
    """

    values: frozenset[ir.Value]
    nodes: frozenset[ir.Node]
    bf16: frozenset[ir.Node]
    clips: frozenset[ir.Node]

    @property
    def names(self) -> frozenset[str]:
        """Of the values."""
        return frozenset(v.name for v in self.values if v.name)


def decide(function: ir.Function, wide: Collection[str]) -> Islands:
    """What is fp32 in a fused function of 16 bit, when these values are. The function is not changed.

    Args:
        wide: names of its inputs, outputs and other values; those that are fp32 already count for nothing.

    Raises:
        GraphError: it has no such value, or an attention in FP8 would have to read one.
    """
    decision = _Decision(function, _named(function, wide))
    while decision.grew():
        pass
    bf16 = _attentions(function, decision.wide)
    return Islands(frozenset(decision.wide), frozenset(decision.nodes), bf16, frozenset(decision.clips))


class _Decision:
    """Grows from the values that are named, until nothing is added."""

    def __init__(self, function: ir.Function, wide: set[ir.Value]):
        self.wide, self.nodes, self.clips = wide, set[ir.Node](), set[ir.Node]()
        self._function = function

    def grew(self) -> bool:
        before = len(self.wide) + len(self.nodes) + len(self.clips)
        for node in self._function if self.wide else ():
            if node.op_type not in _UNTOUCHED and node.op_type not in _ATTENTIONS:
                self._visit(node)
        return len(self.wide) + len(self.nodes) + len(self.clips) > before

    def _visit(self, node: ir.Node) -> None:
        reads = any(v in self.wide for v in node.inputs)
        makes = any(v in self.wide for v in node.outputs)
        if makes and is_fp16_clip(node):
            self.clips.add(node)
            self._widen(node.inputs[0])
        elif reads or (makes and node.op_type not in _MOVES):
            self.nodes.add(node)
            self._follow(node)
            if makes:
                self._precede(node)
        if node in self.nodes and node.op_type in _PRODUCTS:
            self._pull(node)

    def _follow(self, node: ir.Node) -> None:
        """What comes out of a node in fp32 and is not rounded."""
        counted = node.op_type in _COUNTED and sum(not is_parameter(v) for v in node.inputs) == 1
        modulated = node.op_type in _NORMS and _read_only_by(node.outputs[0], lambda user: user.op_type == MODULATE)
        carried = node.op_type in _QUANTIZATION and node.inputs[0] in self.wide
        if node.op_type in _SAME_NUMBERS or counted or modulated or carried:
            for out in node.outputs:
                self._widen(out)

    def _precede(self, node: ir.Node) -> None:
        """A product whose bias is added, or that is scaled by channel or by token, to make an fp32 value."""
        varying = [v for v in node.inputs if v is not None and not is_parameter(v) and not _one_per_token(v)]
        if node.op_type in ("Add", "Mul") and len(varying) == 1 and len(varying[0].uses()) == 1:
            before = varying[0].producer()
            if before is not None and before.op_type in (*_PRODUCTS, "Add", "Mul"):
                self._widen(varying[0])

    def _pull(self, product: ir.Node) -> None:
        """What only products in fp32 read is cast before it is dequantized or transposed: the pattern stays whole."""
        for value in product.inputs:
            node = value.producer() if value is not None else None
            while node is not None and node.op_type in ("Transpose", "DequantizeLinear"):
                if not _read_only_by(node.outputs[0], self.nodes.__contains__):
                    break
                self.nodes.add(node)
                self._widen(node.outputs[0])
                node = node.inputs[0].producer() if node.inputs[0] is not None else None

    def _widen(self, value: ir.Value | None) -> None:
        # Codes of a quantized value are in a type of their own, and carry on that what they stand for is fp32.
        if value is not None and value.dtype != ir.DataType.FLOAT:
            self.wide.add(value)


def is_parameter(value: ir.Value | None) -> bool:
    """Whether it is of the same size for any input: weights, scales, constants, and what is made of them alone."""
    return value is None or (value.shape is not None and all(isinstance(dim, int) for dim in value.shape))


def _one_per_token(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 1 and value.shape[-1] == 1


def is_fp16_clip(node: ir.Node) -> bool:
    """Whether it cuts to the range of fp16, as FLUX and Qwen-Image do with what leaves a block."""
    if node.op_type != "Clip" or node.domain != "" or len(node.inputs) != 3:
        return False
    return [_number(v) for v in node.inputs[1:]] == [-FP16_MAX, FP16_MAX]


def _number(value: ir.Value | None) -> float | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy()) if tensor is not None and tensor.size == 1 else None


def _read_only_by(value: ir.Value, which: Callable[[ir.Node], bool]) -> bool:
    return bool(value.uses()) and not value.is_graph_output() and all(which(node) for node, _ in value.uses())


def _named(function: ir.Function, wide: Collection[str]) -> set[ir.Value]:
    values = {v.name: v for v in (*function.inputs, *(v for node in function for v in node.outputs))}
    unknown = sorted(set(wide) - values.keys())
    if unknown:
        raise GraphError(
            f"what stays in fp32 is a value of {function.name}",
            received=", ".join(unknown),
            fix="make the plan again, with this version",
        )
    return {values[name] for name in wide if values[name].dtype in SIXTEEN_BIT}


def _attentions(function: ir.Function, wide: Collection[ir.Value]) -> frozenset[ir.Node]:
    """Those that read fp32 values as Q, K or V, and are computed in bf16.

    Raises:
        GraphError: one of them is in FP8.
    """
    found = frozenset(n for n in function if n.op_type in _ATTENTIONS and any(v in wide for v in n.inputs[:3]))
    for node in found:
        if node.op_type != "Attention":
            raise GraphError(
                "an attention in FP8 has 16-bit Q, K and V",
                received=f"{node.name} of {function.name}, which would read fp32",
                fix="leave that attention out of FP8",
            )
    return found
