"""Each call of a function with Q/DQ in it calls a copy of its own.

    [blocks.0] MMDiTJointBlock_fp8 ┐      [blocks.0] MMDiTJointBlock_fp8_blocks_0: [blocks.0/img.qkv.proj.quantize] …
    [blocks.1] MMDiTJointBlock_fp8 ┘  ⇒   [blocks.1] MMDiTJointBlock_fp8_blocks_1: [blocks.1/img.qkv.proj.quantize] …

TensorRT's parser names layers of QuantizeLinear and DequantizeLinear by the node alone, whatever call it is in, and
refuses a name that it has seen. Other nodes keep their names.
"""

from __future__ import annotations

import itertools

import onnx_ir as ir

from mmdit_deploy.graph.fuse.clean import unused
from mmdit_deploy.graph.passes import Pass

_NAMED_ONCE = frozenset({"QuantizeLinear", "DequantizeLinear"})


def _copy(model: ir.Model) -> int:
    calls: dict[ir.OperatorIdentifier, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_identifier() in model.functions:
            calls.setdefault(node.op_identifier(), []).append(node)
    taken = {function.name for function in model.functions.values()}
    count = 0
    for key, nodes in calls.items():
        function = model.functions[key]
        for call in nodes:
            named = [node for node in function if node.op_type in _NAMED_ONCE]
            if not named or all((node.name or "").startswith(f"{call.name}/") for node in named):
                continue
            own = function
            if len(nodes) > 1:
                own = function.clone()
                own.name = _name(f"{function.name}_{(call.name or '').replace('.', '_')}", taken)
                model.functions[own.identifier()] = own
                call.op_type = own.name
            for node in own:
                if node.op_type in _NAMED_ONCE:
                    node.name = f"{call.name}/{node.name}"
            count += 1
    if count:
        unused.nodes.apply(model)
    return count


def _name(wanted: str, taken: set[str]) -> str:
    numbered = (f"{wanted}_{i}" for i in itertools.count(2))
    name = next(name for name in itertools.chain([wanted], numbered) if name not in taken)
    taken.add(name)
    return name


functions_by_call: Pass = Pass("functions by call", _copy)
