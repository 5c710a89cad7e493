"""What is known ahead and small becomes a constant.

    Constant [2] ─ Mod(3) ─ Reshape          ⇒   Constant [2]
    Shape(x [b, 77, 64]) ─ Gather(1)         ⇒   Constant 77
    Constant 64 ─ Cast(to float) ─ Sqrt      ⇒   Constant 8.0

Only single numbers and short lists of integers: shapes, axes, scales. A weight is never folded, a transposed one
neither: that would be a second copy of it. What comes out as NaN or infinite from numbers that are not stays, and so
does what one of the runtimes may round otherwise than ONNX's reference: quantization.
"""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.graph.fuse.clean.rewire import RANDOM, every_node, is_plain, replace, small_constant
from mmdit_deploy.graph.fuse.shapes import infer_shapes
from mmdit_deploy.graph.passes import Pass

_STAY = RANDOM | {"Constant", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}
_D = ir.DataType
_TYPES = frozenset(
    (_D.BOOL, _D.FLOAT, _D.FLOAT16, _D.DOUBLE, _D.INT8, _D.INT16, _D.INT32, _D.INT64)
    + (_D.UINT8, _D.UINT16, _D.UINT32, _D.UINT64)
)


def _fold(model: ir.Model) -> int:
    """Fold until shapes tell nothing more: a folded one may be what another shape was waiting for."""
    total = 0
    while count := sum(_fold_node(node, model.opset_imports.get("", 0)) for node in every_node(model)):
        total += count
        infer_shapes(model)
    return total


def _fold_node(node: ir.Node, opset: int) -> bool:
    if node.op_type in _STAY or not is_plain(node) or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    value = _inferred(node) or _evaluated(node, opset)
    if value is None or not _makes_sense(value, node):
        return False
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value)], name=node.name)
    out = constant.outputs[0]
    out.name, out.type, out.shape = node.outputs[0].name, ir.TensorType(value.dtype), ir.Shape(value.numpy().shape)
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return replace(node, out)


def _inferred(node: ir.Node) -> ir.TensorProtocol | None:
    """The elements of a shape, where inference found them all."""
    tensor = node.outputs[0].const_value
    return tensor if tensor is not None and small_constant(node.outputs[0]) is not None else None


def _evaluated(node: ir.Node, opset: int) -> ir.TensorProtocol | None:
    given = [small_constant(value) if value is not None else None for value in node.inputs]
    if not node.inputs or any(t is None and v is not None for t, v in zip(given, node.inputs, strict=True)):
        return None
    if any(t is not None and t.dtype not in _TYPES for t in given):
        return None
    names = {
        v.name or "": t.numpy() for v, t in zip(node.inputs, given, strict=True) if v is not None and t is not None
    }
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            (result,) = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, names)
        except Exception:  # an op that the reference lacks, or operands that do not fit: a runtime will say so
            return None
    if not isinstance(result, np.ndarray | np.generic):
        return None  # a sequence
    tensor = ir.tensor(np.asarray(result))
    probe = ir.Value(const_value=tensor)
    return tensor if tensor.dtype in _TYPES and small_constant(probe) is not None else None


def _makes_sense(value: ir.TensorProtocol, node: ir.Node) -> bool:
    """Never NaN, and infinite only where something infinite went in."""
    tensors = [t for t in map(small_constant, node.inputs) if t is not None]
    infinite = any(bool(np.any(np.isinf(t.numpy()))) for t in tensors if t.dtype in _TYPES)
    return bool(np.all(np.isfinite(value.numpy())) or (infinite and not np.any(np.isnan(value.numpy()))))


constants: Pass = Pass("constants", _fold)
