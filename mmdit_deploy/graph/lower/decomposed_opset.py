"""Every graph in opset 17: what is left in newer ops is said in older ones, or refused.

The graph, its branches and loop bodies, and each function by its own import. A function stays a function: local
functions came before opset 17, with the same IR version 8.
"""

from __future__ import annotations

from functools import cache

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.fuse.opset import FILE_OPSET
from mmdit_deploy.graph.fuse.opset_changes import CannotConvert
from mmdit_deploy.graph.lower.decomposed_changes import CHANGES, IN_FLOAT, in_float
from mmdit_deploy.graph.passes import Pass, label

OPSET = 17
IR_VERSION = 8  # what opset 17 came with
OVERLOADS = 10  # the IR version that brought functions of one name


def _to_opset_17(model: ir.Model) -> int:
    """Nothing was done to a file that was in opset 17, or an older one, when it came: it had no newer ops."""
    newer = [scope for scope in _scopes(model) if scope.opset_imports.get("", 0) > OPSET]
    if not newer:
        return 0
    for scope in newer:
        version = scope.opset_imports[""]
        for node in list(scope.all_nodes()):
            if node.domain == "":
                _downgrade(node, version)
        scope.opset_imports[""] = OPSET
    RemoveUnusedNodesPass()(model)  # axes that are attributes now
    _drop_unused_imports(model)
    model.ir_version = OVERLOADS if any(f.overload for f in model.functions.values()) else IR_VERSION
    return int(model.meta.get(FILE_OPSET, OPSET + 1) > OPSET)


def _scopes(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _downgrade(node: ir.Node, version: int) -> None:
    schema, what, graph = _schema(node.op_type, version), label(node), node.graph
    if schema is None or schema.since_version <= OPSET:
        return  # not ONNX's, or the same
    try:
        if (change := CHANGES.get(node.op_type)) is not None:
            change(node)
        if node.graph is not graph:
            return  # other nodes are in its place
        if node.op_type in IN_FLOAT and _wrong_type(node) is not None:
            in_float(node)
        else:
            _check_fits(node)
    except CannotConvert as error:
        raise UsageError(
            f"every node must have an equal in opset {OPSET}",
            received=f"{node.op_type} of opset {version} ({what}): {error}",
            fix="export the model without this op, or name another dialect",
        ) from error


def _check_fits(node: ir.Node) -> None:
    """What the table does not know of shows here: an op, attribute, input or type that there was not."""
    schema = _schema(node.op_type, OPSET)
    if schema is None:
        raise CannotConvert("there was no such op")
    new = sorted(node.attributes.keys() - schema.attributes.keys())
    if new:
        raise CannotConvert(f"it had no {', '.join(new)}")
    if not schema.min_input <= len(node.inputs) <= schema.max_input or len(node.outputs) > schema.max_output:
        raise CannotConvert(f"it has {len(node.inputs)} inputs and {len(node.outputs)} outputs, which did not fit")
    wrong = _wrong_type(node)
    if wrong is not None:
        raise CannotConvert(f"it did not take {wrong}")


def _wrong_type(node: ir.Node) -> str | None:
    """A type that an input or output of a node must not have in opset 17."""
    schema = _schema(node.op_type, OPSET)
    if schema is None:
        return None
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            formal = formals[min(i, len(formals) - 1)] if formals else None
            if value is None or value.dtype is None or not isinstance(value.type, ir.TensorType) or formal is None:
                continue
            name = f"tensor({value.dtype.name.lower()})"
            if (formal.types and name not in formal.types) and name != "tensor(undefined)":
                return value.dtype.name.lower()
    return None


@cache
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _drop_unused_imports(model: ir.Model) -> None:
    """Of domains that lowering may need, and this one did not."""
    for scope in _scopes(model):
        used = {node.domain for node in scope.all_nodes()} | {""}
        if scope is model.graph:
            used |= {function.domain for function in model.functions.values()}
        for domain in scope.opset_imports.keys() - used:
            del scope.opset_imports[domain]


opset_17: Pass = Pass("opset 17", _to_opset_17)
