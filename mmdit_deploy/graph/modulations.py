"""Does a lowered graph make each call's modulation from that call's own weights?

Joining the modulations of all blocks to one product (`lower.batched_modulation`) works with offsets into the weights
file, and where an engine cannot be run, nothing else would notice a wrong one. So it is read back from what was made,
without the code that made it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from mmdit_deploy.errors import GraphError


@dataclass(frozen=True)
class _Rows:
    """Rows of a product ``x · wᵀ + b``: what it reads, and the bytes of these rows of `w`, and of `b`, in the file."""

    x: str
    spans: tuple[tuple[int, int], ...]
    row_bytes: tuple[int, ...]

    def cut(self, start: int, count: int) -> _Rows:
        spans = tuple(
            (begin + start * size, begin + (start + count) * size)
            for (begin, _), size in zip(self.spans, self.row_bytes, strict=True)
        )
        return _Rows(self.x, spans, self.row_bytes)


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
    made = _products(lowered)
    for node in standard.graph.node:
        if node.name not in calls:
            continue
        expected = _product(node.input, {i.name: i for i in standard.graph.initializer})
        found = made.get(node.output[0])
        if expected is None or found != expected:
            raise GraphError(
                f"{node.name} is made from its own rows of the weights file: {expected}",
                received=str(found or "no product"),
                fix="report this as a bug",
            )
    return len(calls)


def _products(model: onnx.ModelProto) -> dict[str, _Rows]:
    """Every value of the main graph that is rows of a product with weights of the file."""
    initializers = {i.name: i for i in model.graph.initializer}
    constants: dict[str, np.ndarray] = {}
    made: dict[str, _Rows] = {}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node)
        elif node.op_type == "Reshape" and node.input[0] in made:
            made[node.output[0]] = made[node.input[0]]
        elif node.op_type == "Split" and node.input[0] in made:
            counts = constants[node.input[1]].tolist()
            whole = made[node.input[0]]
            rows = (whole.spans[0][1] - whole.spans[0][0]) // whole.row_bytes[0] // sum(counts)
            start = 0
            for output, count in zip(node.output, counts, strict=True):
                made[output] = whole.cut(start * rows, count * rows)
                start += count
        elif (product := _product(node.input, initializers)) is not None:
            made[node.output[0]] = product
    return made


def _product(inputs: Collection[str], initializers: dict[str, onnx.TensorProto]) -> _Rows | None:
    """Of (x, weight) or (x, weight, bias), with both in the file; else None."""
    x, *weights = inputs or [""]
    if not 1 <= len(weights) <= 2 or not all(weight in initializers for weight in weights):
        return None
    spans, row_bytes = [], []
    for tensor in (initializers[weight] for weight in weights):
        external = {entry.key: entry.value for entry in tensor.external_data}
        if "length" not in external:
            return None
        begin, length = int(external.get("offset", 0)), int(external["length"])
        spans.append((begin, begin + length))
        row_bytes.append(length // tensor.dims[0])
    return _Rows(x, tuple(spans), tuple(row_bytes))


def _constant(node: onnx.NodeProto) -> np.ndarray:
    attribute = node.attribute[0]
    return np.array(attribute.ints) if attribute.name == "value_ints" else numpy_helper.to_array(attribute.t)
