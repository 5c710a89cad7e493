"""Islands of fp32 in a function of 16 bit.

    img16 ─ LayerNorm ─ Modulate ─ MatMul        img32 ─ LayerNorm ─ Modulate ─ Cast(16) ─ MatMul
      └───── GatedResidual ─ sum16          ⇒      └───── GatedResidual ─ sum32
    gate16 ─────┘                                gate16 ─ Cast(32) ┘

    add ─ Clip(±65504) ─ out16              ⇒    add ─ out32
    Attention(q, k, v)                      ⇒    Cast(Attention(Cast(q, bf16), Cast(k, bf16), Cast(v, bf16)))

Casts stand at the border alone, one for each value: what was in fp32 and is read in fp32 is not rounded in between.
What is fp32, `wide_values` decides. TensorRT fuses casts into its kernels (`bench/fp16_islands.py`).
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from mmdit_deploy.graph.precision.wide_values import SIXTEEN_BIT, Islands, decide

FP32, BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def widen(function: ir.Function, wide: Collection[str]) -> None:
    """Let values of a fused function be fp32, in place, and whatever must be to make and read them.

    Values keep their names; one that is computed in fp32 and rounded is called ``<name>.fp32`` before. Doing it twice
    changes nothing.

    Args:
        wide: names of its inputs, outputs and other values.

    Raises:
        GraphError: it has no such value, or an attention in FP8 would have to read one.
    """
    _Widening(function, decide(function, wide)).apply()


class _Widening:
    def __init__(self, function: ir.Function, islands: Islands):
        self._function, self._islands = function, islands
        self._read_as: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._casts: set[ir.Node] = set()
        self._wide = set(islands.values)  # as names move on to what is cast

    def apply(self) -> None:
        for value in self._function.inputs:
            if value in self._wide:
                value.type = ir.TensorType(FP32)
        for node in list(self._function):
            if node in self._islands.clips:
                self._drop(node)
            elif node.op_type == "Cast":
                self._cast(node)
            elif node in self._islands.nodes:
                self._compute(node, FP32)
            elif node in self._islands.bf16:
                self._compute(node, BF16)
            else:
                self._only_read_in_fp32(node)
        for node in reversed(list(self._function)):
            unused = not any(out.uses() or out.is_graph_output() for out in node.outputs)
            if unused and (node in self._casts or node.op_type == "Constant"):
                self._function.remove(node, safe=True)

    def _compute(self, node: ir.Node, dtype: ir.DataType) -> None:
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype in (*SIXTEEN_BIT, FP32):
                node.replace_input_with(i, self._as(value, dtype))
        for out in node.outputs:
            if out.dtype in SIXTEEN_BIT:
                kept = FP32 if out in self._wide else out.dtype
                out.type = ir.TensorType(dtype)
                if kept != dtype:
                    self._hand_on(out, kept)

    def _only_read_in_fp32(self, node: ir.Node) -> None:
        """What moves numbers of 16 bit, or averages them, makes numbers of 16 bit: they are cast behind it."""
        for out in node.outputs:
            if out in self._wide and out.dtype in SIXTEEN_BIT:
                self._hand_on(out, FP32)

    def _hand_on(self, value: ir.Value, dtype: ir.DataType) -> None:
        """Let all who read a value read it in another type, under its name."""
        uses, name = list(value.uses()), value.name
        cast = self._behind(value, dtype)
        made = cast.outputs[0]
        value.name, made.name = f"{name}.{_short(value.dtype)}", name
        for user, index in uses:
            user.replace_input_with(index, made)
        self._replace_output(value, made)
        if value in self._wide:
            self._wide.add(made)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in a type; what was rounded from that type is taken from before."""
        if value.dtype == dtype:
            return value
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
            source = producer.inputs[0]
            if source.dtype == dtype and (producer in self._casts or dtype == FP32):
                return source
        if (value, dtype) not in self._read_as:
            constant = self._constant(value, dtype)
            if constant is None:
                cast = self._behind(value, dtype)
                cast.outputs[0].name = f"{value.name}.{_short(dtype)}"
                constant = cast.outputs[0]
            self._read_as[value, dtype] = constant
        return self._read_as[value, dtype]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        producer = value.producer()
        if producer is None or producer.op_type != "Constant":
            return None
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None
        made = ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)
        node = ir.node("Constant", [], attributes={"value": made}, name=f"{producer.name}.{_short(dtype)}")
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{value.name}.{_short(dtype)}", ir.TensorType(dtype), value.shape
        out.const_value = made
        self._function.insert_after(producer, node)
        return out

    def _behind(self, value: ir.Value, dtype: ir.DataType) -> ir.Node:
        """A cast, right behind what makes the value."""
        cast = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{value.name}.{_short(dtype)}.cast")
        made = cast.outputs[0]
        made.shape, made.type = value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self._function.insert_before(self._function[0], cast)
        else:
            self._function.insert_after(producer, cast)
        self._casts.add(cast)
        return cast

    def _cast(self, node: ir.Node) -> None:
        """A cast that the function had: nothing is left of it where both sides are fp32 now."""
        source, out = node.inputs[0], node.outputs[0]
        assert source is not None
        if out in self._wide:  # was rounded, and is not to be
            out.type = ir.TensorType(FP32)
        if out.dtype != FP32:
            return
        producer = source.producer()
        if source.dtype != FP32 and producer in self._casts:
            source = self._as(source, FP32)
        if source.dtype == FP32:
            self._replace(node, source)

    def _drop(self, clip: ir.Node) -> None:
        source = clip.inputs[0]
        assert source is not None
        self._replace(clip, source)

    def _replace(self, node: ir.Node, source: ir.Value) -> None:
        """Let all who read what a node makes read another value of those numbers."""
        out = node.outputs[0]
        if out.is_graph_output() or out in self._wide:  # which has a value, and a name, of its own
            same = ir.node("Identity", [source], name=node.name)
            made = same.outputs[0]
            out.type = ir.TensorType(FP32)  # which the new one takes over, with the name
            ir.convenience.replace_nodes_and_values(self._function, node, [node], [same], [out], [made])
            return
        for user, index in list(out.uses()):
            user.replace_input_with(index, source)
        self._function.remove(node, safe=True)

    def _replace_output(self, value: ir.Value, by: ir.Value) -> None:
        for i, out in enumerate(self._function.outputs):
            if out is value:
                self._function.outputs[i] = by


def _short(dtype: ir.DataType | None) -> str:
    assert dtype is not None
    return {FP32: "fp32", BF16: "bf16", ir.DataType.FLOAT16: "fp16"}.get(dtype, dtype.short_name())
