"""What nothing needs: nodes and initializers that no output depends on, functions without calls, unused opset imports.

And, as the last that reads the graph before rules do, the notes that shape inference left on values.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_shape_inference import SYM_DATA_KEY

from mmdit_deploy.graph.fuse.clean.rewire import every_node, every_scope
from mmdit_deploy.graph.passes import Pass


def _remove_nodes(model: ir.Model) -> int:
    """Functions first, so that what only they need goes with them."""
    for node in every_node(model):
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.pop(SYM_DATA_KEY, None)
    dropped = _remove_functions(model)
    before = _size(model)
    RemoveUnusedNodesPass()(model)
    return dropped + before - _size(model) + _remove_functions(model)


def _size(model: ir.Model) -> int:
    return sum(1 for _ in every_node(model)) + sum(len(graph.initializers) for graph in model.graphs())


def _remove_functions(model: ir.Model) -> int:
    used: set[ir.OperatorIdentifier] = set()
    scopes: list[ir.Graph | ir.Function] = [model.graph]
    while scopes:
        called = {node.op_identifier() for node in scopes.pop().all_nodes()} & model.functions.keys()
        scopes += [model.functions[name] for name in called - used]
        used |= called
    unused = model.functions.keys() - used
    for name in unused:
        del model.functions[name]
    return len(unused)


def _remove_imports(model: ir.Model) -> int:
    count = 0
    defined = {domain for domain, _, _ in model.functions}
    for scope in every_scope(model):
        needed = {node.domain for node in scope.all_nodes()} | {""}
        if scope is model.graph:
            needed |= defined
        for domain in scope.opset_imports.keys() - needed:
            del scope.opset_imports[domain]
            count += 1
    return count


nodes: Pass = Pass("unused nodes", _remove_nodes)
imports: Pass = Pass("unused imports", _remove_imports)
