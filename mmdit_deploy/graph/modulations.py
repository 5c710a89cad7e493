"""Does a lowered graph make each call's modulation from that call's own weights?

Joining the modulations of all blocks to one product (`lower.batched_modulation`) works with offsets into the weights
file, and where an engine cannot be run, nothing else would notice a wrong one. So it is read back from what was made,
without the code that made it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from mmdit_deploy.errors import GraphError


@dataclass(frozen=True)
class _Span:
    """A tensor in the file.

    Args:
        use: what the product does with it.
        row_bytes: of each of its rows, of which the product has a column each; 0 of a number for all.
    """

    use: str
    begin: int
    end: int
    row_bytes: int

    def cut(self, start: int, count: int) -> _Span:
        return replace(
            self, begin=self.begin + start * self.row_bytes, end=self.begin + (start + count) * self.row_bytes
        )


@dataclass(frozen=True)
class _Rows:
    """Rows of a product ``x · wᵀ``, scaled and shifted: what it reads, and these rows' bytes in the file.

    Args:
        x: the name of a value; None of weights that are not multiplied yet.
    """

    x: str | None
    spans: tuple[_Span, ...]

    def cut(self, start: int, count: int) -> _Rows:
        return replace(self, spans=tuple(span.cut(start, count) for span in self.spans))

    def using(self, span: _Span, use: str) -> _Rows:
        """With one more tensor of the file; a number for all rows says nothing of whose they are."""
        return replace(self, spans=(*self.spans, replace(span, use=use))) if span.row_bytes else self

    @property
    def count(self) -> int:
        return (self.spans[0].end - self.spans[0].begin) // self.spans[0].row_bytes


def check_modulations(lowered: onnx.ModelProto, standard: onnx.ModelProto, calls: Collection[str]) -> int:
    """Check that each modulation of the lowered graph is the product that it is in the standard graph.

    Args:
        lowered: with modulations joined, of all calls or of one segment's.
        standard: the whole graph, or that segment, before.
        calls: the modulations' paths, which are also the names of the values that they make.

    Returns:
        How many were compared.

    Raises:
        GraphError: one reads another's weights, or is not made of a product at all.
    """
    made, expected = _made(lowered, calls), _made(standard, calls)
    for node in standard.graph.node:
        if node.name not in calls:
            continue
        wanted, found = expected.get(node.output[0]), made.get(node.output[0])
        if not isinstance(wanted, _Rows) or found != wanted:
            raise GraphError(
                f"{node.name} is made from its own rows of the weights file: {wanted}",
                received=str(found or "no product"),
                fix="report this as a bug",
            )
    return len(calls)


_Known = str | _Span | _Rows | np.ndarray  # an activation's name, a tensor of the file, what they make, a constant


def _made(model: onnx.ModelProto, calls: Collection[str]) -> dict[str, _Known]:
    """What is known of every value of the main graph; of functions only those calls are looked into."""
    functions = {f.name: f for f in model.functions}
    values: dict[str, _Known] = {value.name: value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        span = _span(tensor)
        if span is not None:
            values[tensor.name] = span
    for node in model.graph.node:
        if node.name in calls and node.op_type in functions:
            body = functions[node.op_type]
            given = {
                formal: values[name] for formal, name in zip(body.input, node.input, strict=False) if name in values
            }
            _evaluate(body.node, given)
            made = {out: given[formal] for formal, out in zip(body.output, node.output, strict=True) if formal in given}
            values.update(made)
        else:
            _evaluate([node], values)
        for name in node.output:
            values.setdefault(name, name)
    return values


def _evaluate(nodes: Iterable[onnx.NodeProto], values: dict[str, _Known]) -> None:
    for node in nodes:
        read = [values.get(name) for name in node.input]
        if node.op_type == "Constant":
            values[node.output[0]] = _constant(node)
        elif node.op_type == "Split" and isinstance(read[0], _Rows) and isinstance(read[1], np.ndarray):
            _split(node, read[0], read[1].tolist(), values)
        elif (rows := _rows(node.op_type, read)) is not None:
            values[node.output[0]] = rows


def _split(node: onnx.NodeProto, whole: _Rows, counts: list[int], values: dict[str, _Known]) -> None:
    rows = whole.count // sum(counts)
    start = 0
    for output, count in zip(node.output, counts, strict=True):
        values[output] = whole.cut(start * rows, count * rows)
        start += count


def _rows(op: str, read: list[_Known | None]) -> _Rows | None:
    """What an op makes, if it is rows of a product or of its weights."""
    first, second = (*read, None, None)[:2]
    if isinstance(first, _Rows) and op in ("Reshape", "Unsqueeze", "Transpose"):
        return first
    if isinstance(first, _Span) and op == "Transpose":
        return _Rows(None, ()).using(first, "weight")
    if isinstance(first, _Span) and isinstance(second, _Span) and op == "DequantizeLinear":
        return _Rows(None, ()).using(first, "weight").using(second, "scale")
    if isinstance(first, str) and isinstance(second, _Rows) and op == "MatMul":
        return replace(second, x=first)
    if isinstance(first, str) and op == "Gemm" and all(isinstance(value, _Span) for value in read[1:]):
        rows = _Rows(first, ())
        for value, use in zip(read[1:], ("weight", "added"), strict=False):
            assert isinstance(value, _Span)
            rows = rows.using(value, use)
        return rows
    uses = {"Mul": "multiplied", "Add": "added"}
    if isinstance(first, _Rows) and isinstance(second, _Span) and op in uses:
        return first.using(second, uses[op])
    return None


def _span(tensor: onnx.TensorProto) -> _Span | None:
    external = {entry.key: entry.value for entry in tensor.external_data}
    if "length" not in external:
        return None
    begin, length = int(external.get("offset", 0)), int(external["length"])
    return _Span("", begin, begin + length, length // tensor.dims[0] if tensor.dims else 0)


def _constant(node: onnx.NodeProto) -> np.ndarray:
    attribute = node.attribute[0]
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t)
    return np.array(onnx.helper.get_attribute_value(attribute))
