"""Every graph in opset 23: the first with `Attention`, `RMSNormalization` and `RotaryEmbedding`.

The graph, its branches and loop bodies, and each function by its own import; nothing is inlined. A newer opset stays.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.fuse.interface import INITIALIZERS_ARE_INPUTS
from mmdit_deploy.graph.fuse.opset_changes import CHANGES, CannotConvert
from mmdit_deploy.graph.fuse.shapes import infer_shapes
from mmdit_deploy.graph.passes import Pass, label

OPSET = 23
OLDEST = 7  # before it, arithmetic broadcast only where an attribute said so
# Up to which opset what becomes of an op depends on the shape or type of what it reads.
_NEEDS_SHAPES = {"Clip": 11, "Pad": 11, "Hardmax": 13, "LogSoftmax": 13, "Softmax": 13, "GroupNormalization": 21}
_IR_VERSION = 11  # what opset 23 came with
FILE_OPSET = "mmdit.opset"  # in a model's `meta`: the newest opset of the file that it came in


def _to_opset_23(model: ir.Model) -> int:
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    versions = [_version(scope) for scope in scopes]  # all are checked before any is changed
    model.meta.setdefault(FILE_OPSET, max(versions))
    old = [(scope, version) for scope, version in zip(scopes, versions, strict=True) if version < OPSET]
    if not old:
        return 0
    if any(version < _NEEDS_SHAPES.get(node.op_type, 0) for scope, version in old for node in scope.all_nodes()):
        infer_shapes(model)
    for scope, version in old:
        for node in list(scope.all_nodes()):
            if node.domain == "":
                _upgrade(node, version)
        scope.opset_imports[""] = OPSET
    if model.ir_version < INITIALIZERS_ARE_INPUTS:
        _only_real_inputs(model.graph)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return 1


def _version(scope: ir.Graph | ir.Function) -> int:
    """The opset of a scope, which may import ONNX's domain by either of its two names."""
    imports = scope.opset_imports
    if "ai.onnx" in imports:
        imports[""] = max(imports.pop("ai.onnx"), imports.get("", 0))
    version = imports.get("", OPSET)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= version <= newest:
        raise UsageError(
            f"graphs of opset {OLDEST} to {newest} are read",
            received=f"opset {version}" + (f" in the function {scope.name}" if isinstance(scope, ir.Function) else ""),
            fix="export the model again" if version < OLDEST else "a newer version of the package onnx",
        )
    return version


def _upgrade(node: ir.Node, version: int) -> None:
    what = label(node)
    try:
        for since, change in CHANGES.get(node.op_type, ()):
            if version < since:
                change(node)
        # Upsample is Resize by now, and so on: what came of a node is in no need of more, only of a look
        _check_fits(node)
    except CannotConvert as error:
        raise UsageError(
            f"every node of a graph to fuse must have an equal in opset {OPSET}",
            received=f"{node.op_type} of opset {version} ({what}): {error}",
            fix=f"export the model again with opset {OPSET}, or without this op",
        ) from error


def _check_fits(node: ir.Node) -> None:
    """What the table does not know of shows here: an op, attribute or input that is no more."""
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return  # not ONNX's, or from an opset yet to come: none of ours either
    if schema.deprecated:
        raise CannotConvert("the op is no more")
    gone = sorted(node.attributes.keys() - schema.attributes.keys())
    if gone:
        raise CannotConvert(f"it has no {', '.join(gone)} any more")
    if len(node.inputs) > schema.max_input or len(node.outputs) > schema.max_output:
        raise CannotConvert(f"it has {len(node.inputs)} inputs and {len(node.outputs)} outputs, which are too many")


def _only_real_inputs(graph: ir.Graph) -> None:
    """Before IR version 4 every initializer was listed as an input; from then on that means a default."""
    real = [value for value in graph.inputs if not value.is_initializer()]
    graph.inputs.clear()
    graph.inputs.extend(real)


opset: Pass = Pass("opset 23", _to_opset_23)
