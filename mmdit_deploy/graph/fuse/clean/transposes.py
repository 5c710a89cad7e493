"""Two Transposes in a row.

    Transpose(Transpose(x, [0,2,1,3]), [0,2,1,3])   ⇒   x
    Transpose(Transpose(x, [0,2,1,3]), [0,1,3,2])   ⇒   Transpose(x, [0,2,3,1])

Those that cancel go before rules read the graph. Merging two that do not would hide what each is for, a K transposed
for a product from heads set apart: that comes last, where nothing else reads the one between.
"""

from __future__ import annotations

import onnx_ir as ir

from mmdit_deploy.graph.fuse.clean.rewire import every_node, replace
from mmdit_deploy.graph.passes import Pass


def _cancel(model: ir.Model) -> int:
    count = 0
    for node in every_node(model):
        pair = _pair(node)
        if pair is not None and pair[1] == sorted(pair[1]):
            count += replace(node, pair[0])
    return count


def _merge(model: ir.Model) -> int:
    count = 0
    for node in every_node(model):
        pair, middle = _pair(node), node.inputs[0] if node.inputs else None
        if pair is None or middle is None or len(middle.uses()) > 1 or middle.is_graph_output():
            continue
        x, perm = pair
        node.replace_input_with(0, x)
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        first = middle.producer()
        assert first is not None and first.graph is not None
        first.graph.remove(first, safe=True)
        count += 1
    return count


def _pair(node: ir.Node) -> tuple[ir.Value, list[int]] | None:
    """What the first of two Transposes reads, and what both do to it."""
    after = _perm(node)
    middle = node.inputs[0] if after is not None else None
    first = None if middle is None else middle.producer()
    before = None if first is None or first.graph is not node.graph else _perm(first)
    if first is None or before is None or after is None or len(before) != len(after) or first.inputs[0] is None:
        return None
    return first.inputs[0], [before[axis] for axis in after]


def _perm(node: ir.Node) -> list[int] | None:
    perm = node.attributes.get("perm") if node.op_type == "Transpose" and node.domain == "" else None
    return None if perm is None or perm.is_ref() else list(perm.as_ints())


cancelled: Pass = Pass("transposes that cancel", _cancel)
merged: Pass = Pass("transposes in a row", _merge)
