"""What a small value is in every run, without running the graph.

    Div(1, Sqrt(Cast(Slice(Shape(q [B, 24, N, 64]), -1))))   ⇒   0.125

Computed as the graph would, in the graph's own types. Weights are never loaded: what is not small is not known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.graph.attributes import given_by_call

_SMALL = 64  # elements: scales, shapes and axes
_OPSET = 23
# Of these, whatever their inputs: cheap, and without a graph inside.
_COMPUTED = frozenset(
    "Add Cast CastLike Concat ConstantOfShape Div Equal Expand Gather Identity Mul Neg Pow Reciprocal Reshape Slice "
    "Sqrt Squeeze Sub Unsqueeze Where".split()
)
_PICKS = frozenset({"Gather", "Identity", "Slice", "Squeeze"})  # of a shape's dims, some


def known(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The elements of a small value, if they are the same in every run."""
    return _known(value, {})


def _known(value: ir.Value | None, found: dict[ir.Value, np.ndarray[Any, Any] | None]) -> np.ndarray[Any, Any] | None:
    """Each value is looked at once: 40 sums of a value with itself are 2⁴⁰ ways to the first."""
    if value is None or value.is_graph_input():  # an input's initializer is only its default
        return None
    if value not in found:
        found[value] = _read(value, found)
    return found[value]


def _read(value: ir.Value, found: dict[ir.Value, np.ndarray[Any, Any] | None]) -> np.ndarray[Any, Any] | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy() if tensor.size <= _SMALL else None
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or given_by_call(node) is not None:
        return None
    if node.op_type == "Shape":
        return _shape(node)
    if node.op_type not in _COMPUTED:
        return None
    picked = _picked_dims(node)
    return picked if picked is not None else _computed(node, [_known(v, found) for v in node.inputs])


def number(value: ir.Value | None) -> float | None:
    """The number of a value of one element, if it is the same in every run."""
    elements = known(value)
    return float(elements.reshape(())) if elements is not None and elements.size == 1 else None


def is_zero(value: ir.Value | None) -> bool:
    """Whether every element is 0 in every run, whatever its shape."""
    elements = known(value)
    if elements is not None:
        return not np.any(elements)
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not (fill.is_ref() or np.any(fill.as_tensor().numpy()))
    if node.op_type in ("Expand", "Identity", "Cast", "Reshape"):
        return is_zero(node.inputs[0])
    # 0 · x is 0 unless x is infinite or not a number: both must be 0
    return node.op_type == "Mul" and all(map(is_zero, node.inputs))


def _shape(node: ir.Node) -> np.ndarray[Any, Any] | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    dims = list(shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))]
    return np.array(dims, dtype=np.int64) if all(isinstance(d, int) for d in dims) else None


def _picked_dims(node: ir.Node) -> np.ndarray[Any, Any] | None:
    """Static dims picked from a shape of which others are symbolic."""
    source = node.inputs[0].producer() if node.op_type in _PICKS and node.inputs[0] is not None else None
    if source is None or source.op_type != "Shape" or given_by_call(source) is not None:
        return None
    if source.inputs[0] is None or source.inputs[0].shape is None:
        return None
    shape = list(source.inputs[0].shape)
    axes = np.arange(len(shape))[source.attributes.get_int("start", 0) : source.attributes.get_int("end", len(shape))]
    picked = _computed(node, [axes, *(known(v) for v in node.inputs[1:])])
    if picked is None:
        return None
    dims = [shape[axis] for axis in picked.flat]
    return np.array(dims, dtype=np.int64).reshape(picked.shape) if all(isinstance(d, int) for d in dims) else None


def _computed(node: ir.Node, inputs: list[np.ndarray[Any, Any] | None]) -> np.ndarray[Any, Any] | None:
    names = [f"x{i}" if v is not None else "" for i, v in enumerate(node.inputs)]
    feeds: dict[str, Any] = {name: x for name, x in zip(names, inputs, strict=True) if name and x is not None}
    if len(feeds) != sum(map(bool, names)) or any(a.is_ref() for a in node.attributes.values()):
        return None
    attributes = [ir.serde.serialize_attribute(a) for a in node.attributes.values()]
    proto = onnx.NodeProto(op_type=node.op_type, input=names, output=["y"], attribute=attributes)
    given = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), None)
        for name, x in feeds.items()
    ]
    graph = onnx.helper.make_graph([proto], "one node", given, [onnx.ValueInfoProto(name="y")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)])
    with np.errstate(all="ignore"):  # a division by zero is the graph's own
        outputs = ReferenceEvaluator(model).run(None, feeds)
    assert isinstance(outputs, list)
    y = np.asarray(outputs[0])
    return y if y.size <= _SMALL else None
