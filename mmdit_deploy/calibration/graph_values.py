"""What each operator of a traced call is in the fused function of the standard graph: a value, or a part of a node.

    operators of PyTorch                 the fused function
    split, getitem_2 (the gate)          split_split_2
    linear_2                             linear_2
    mul_145 (gate · linear_2) ┐
    add_226 (+ img)           ┘          add_226 = MMDiTGatedResidual(img, split_split_2, linear_2)

What only moves numbers has no place of its own where a fusion swallowed it: they are those of what it moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import fx

from mmdit_deploy.eager.program import Program
from mmdit_deploy.graph.assemble import IR_VERSION, trace_kinds
from mmdit_deploy.graph.fuse import FUSE
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import run
from mmdit_deploy.graph.trace import OPSET
from mmdit_deploy.model import Call

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CONSTANT = torch.ops.aten.scalar_tensor.default
_MOVES = frozenset(
    "_unsafe_view alias cat chunk clone contiguous detach expand permute reshape select slice split split_with_sizes"
    " squeeze stack transpose unbind unsqueeze view".split()
)


def fused_functions(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, ir.Function]:
    """The function of every kind of call as the standard graph has it before any precision plan, by name.

    Args:
        calls: of one model.
        dtype: its compute type.
    """
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}), ir_version=IR_VERSION)
    traced = trace_kinds(calls, dtype)
    for function in traced.values():
        model.functions[function.identifier()] = function.clone()
    run(model, FUSE)
    return {function.name: function for function in model.functions.values() if function.name in traced}


class GraphValues:
    """Where each operator that computes in the compute type is in the fused function.

    Attributes:
        program, function: of one kind of call.
        values: by operator's name, the value that it makes.
        inside: by operator's name, the node that it is a part of.
        attentions: by operator's name, the attention that it is.
    """

    def __init__(self, program: Program, function: ir.Function):
        self.program, self.function = program, function
        self._known = {v.name: v for v in (*function.inputs, *(v for node in function for v in node.outputs))}
        self.values: dict[str, ir.Value] = {}
        self.inside: dict[str, ir.Node] = {}
        self.attentions: dict[str, ir.Node] = {}
        operators = [n for n in program.module.graph.nodes if n.op == "call_function"]
        for operator in operators:
            value = self._value(operator)
            if value is not None and is_computed(operator, program.dtype):
                self.values[operator.name] = value
        for operator in operators:
            if operator.name not in self.values and is_computed(operator, program.dtype):
                self._place(operator)

    def named(self, name: str) -> ir.Value | None:
        """The value that statistics mean by a name: of an activation, an output, or an operator."""
        return self.values.get(name) or self._known.get(name)

    def _value(self, operator: fx.Node) -> ir.Value | None:
        name = self.program.outputs.get(operator.name, operator.name)
        if name in self._known:
            return self._known[name]
        source = operator.args[0] if operator.args else None
        if _name(operator) == "getitem" and isinstance(source, fx.Node):
            return self._known.get(f"{source.name}_split_{operator.args[1]}")
        return None

    def _place(self, operator: fx.Node) -> None:
        if operator.target is _CONSTANT or _name(operator) in (*_MOVES, "getitem"):
            return
        holder = next((self.values[n.name].producer() for n in _behind(operator) if n.name in self.values), None)
        if holder is None:
            return
        if operator.target is ATTENTION:
            self.attentions[operator.name] = holder
        else:
            self.inside[operator.name] = holder


def is_computed(operator: fx.Node, dtype: torch.dtype) -> bool:
    """Whether it makes a tensor in the compute type."""
    made = operator.meta.get("val")
    return isinstance(made, torch.Tensor) and made.dtype == dtype


def graph_values(programs: Mapping[str, Program], functions: Mapping[str, ir.Function]) -> dict[str, GraphValues]:
    """Those of every kind, by function."""
    return {name: GraphValues(programs[name], functions[name]) for name in programs}


def _behind(operator: fx.Node) -> Iterator[fx.Node]:
    """What reads an operator, and what reads that: the nearest first."""
    seen, ahead = {operator}, [operator]
    while ahead:
        node = ahead.pop(0)
        for user in node.users:
            if user not in seen:
                seen.add(user)
                ahead.append(user)
                yield user


def _name(operator: fx.Node) -> str:
    target = operator.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))
