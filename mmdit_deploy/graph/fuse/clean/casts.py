"""Casts that cancel, or of which one does for two.

    Cast(Cast(x fp16, to fp32), to fp16)   ⇒   x
    Cast(Cast(x fp16, to fp32), to bf16)   ⇒   Cast(x, to bf16)

Only where the first loses nothing. fp32 → fp16 → fp32 rounds, and stays.
"""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.graph.fuse.clean.rewire import every_node, replace
from mmdit_deploy.graph.passes import Pass

_D = ir.DataType
_FLOATS = (_D.FLOAT, _D.DOUBLE)
# What holds every value of a type.
_HOLDS: dict[ir.DataType, tuple[ir.DataType, ...]] = {
    _D.BFLOAT16: _FLOATS,
    _D.FLOAT16: _FLOATS,
    _D.FLOAT: (_D.DOUBLE,),
    _D.BOOL: (_D.INT8, _D.UINT8, _D.INT32, _D.INT64, _D.FLOAT16, _D.BFLOAT16, *_FLOATS),
    _D.INT8: (_D.INT16, _D.INT32, _D.INT64, _D.FLOAT16, _D.BFLOAT16, *_FLOATS),
    _D.UINT8: (_D.UINT16, _D.UINT32, _D.UINT64, _D.INT16, _D.INT32, _D.INT64, _D.FLOAT16, _D.BFLOAT16, *_FLOATS),
    _D.INT16: (_D.INT32, _D.INT64, *_FLOATS),
    _D.UINT16: (_D.UINT32, _D.UINT64, _D.INT32, _D.INT64, *_FLOATS),
    _D.INT32: (_D.INT64, _D.DOUBLE),
    _D.UINT32: (_D.UINT64, _D.INT64, _D.DOUBLE),
}


def _cancel(model: ir.Model) -> int:
    return sum(_skip_first(node) for node in every_node(model) if _is_cast(node))


def _is_cast(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Cast" and node.domain == "" and not node.attributes["to"].is_ref()


def _skip_first(node: ir.Node) -> bool:
    middle = node.inputs[0]
    first = None if middle is None else middle.producer()
    if first is None or not _is_cast(first):
        return False
    x, between, to = first.inputs[0], _to(first), _to(node)
    if x is None or x.dtype is None or between not in _HOLDS.get(x.dtype, ()):
        return False
    if to == ir.DataType.STRING:
        return False  # how many digits it has depends on what is written
    if x.dtype == to and replace(node, x):
        return True
    node.replace_input_with(0, x)
    return True


def _to(node: ir.Node) -> ir.DataType:
    return ir.DataType(node.attributes.get_int("to", 0))


casts: Pass = Pass("casts that cancel", _cancel)
