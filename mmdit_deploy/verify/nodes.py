"""One call, node by node: the engine beside the eager model as planned, each value on equal inputs.

    engine:  x ─ LayerNormalization ─ add_61 ─ FusedMatMul ─ Add ─ linear ─ …
                                         │                           ▲
    eager:       layer_norm, mul, add    └──────► linear ────────────┘ compared

The eager operators get the engine's *own* values, wherever both have a value of one name. So every comparison is of
what lies between two such values, and of nothing else: errors do not add up, a rounding that falls the other way does
not make the next quantization fall the other way too, and the first value out of tolerance is where the fault is. What
is left is arithmetic in the compute type, whose tolerance binds at every precision; with the slack that `PlannedCall`
measures where that arithmetic decides what a value is quantized to.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import onnx
import torch
from torch import Tensor, fx

from mmdit_deploy.eager.planned import PlannedCall
from mmdit_deploy.eager.program import Program
from mmdit_deploy.precision import PrecisionPlan
from mmdit_deploy.verify.exposed import Body
from mmdit_deploy.verify.findings import Element
from mmdit_deploy.verify.metrics import compare, within
from mmdit_deploy.verify.records import Errors
from mmdit_deploy.verify.tolerances import Tolerance

# Nodes behind which the same numbers are, in another type or shape.
_HAND_ON = frozenset("Cast Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())


@dataclass(frozen=True)
class Compared:
    """A value that was compared.

    Args:
        made_by: the eager model's operator.
        value: its name in the graph's function, where others read it.
        errors: of the engine's against the eager model's, on the engine's own inputs.
        bound: the tolerance, with the slack of what is quantized there.
        passed: whether they are within tolerance.
        element: the first that is off by more than the tolerance times a typical element; None if it passed.
    """

    made_by: fx.Node
    value: str
    errors: Errors
    bound: Tolerance
    passed: bool
    element: Element | None = None

    @property
    def share(self) -> float:
        """Its rel-L2, of what is allowed there."""
        return self.errors.rel_l2 / self.bound.max_rel_l2


class Matching:
    """Which values of a graph's function are which operators' of the eager model.

    Args:
        program: of the call's kind.
        body: of the call.
    """

    def __init__(self, program: Program, body: Body):
        self.program, self.body = program, body
        # The outputs of a function have names of their own; they are in the kind's order.
        self._outputs = dict(zip(program.outputs, body.function.output, strict=True))
        found = {n: self._value(n) for n in program.module.graph.nodes if n.op == "call_function"}
        self.values: Mapping[fx.Node, str] = {n: v for n, v in found.items() if v is not None}
        """By operator, what its value is called in the function."""

    def _value(self, node: fx.Node) -> str | None:
        if node.name in self._outputs:
            return self._outputs[node.name]
        name = node.name
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            name = f"{node.args[0].name}_split_{node.args[1]}"  # as the exporter calls the parts of a Split
        return self.body.read_as(name)

    def made_of(self, node: fx.Node) -> list[fx.Node]:
        """What the eager model's value is made of since the last values that the function has too, in order."""
        seen: dict[fx.Node, None] = {}

        def visit(n: fx.Node) -> None:
            for source in n.all_input_nodes:
                if source not in seen and source not in self.values:
                    visit(source)
            seen[n] = None

        visit(node)
        return list(seen)

    def fp32_inputs(self, plan: PrecisionPlan) -> Callable[[fx.Node], bool]:
        """Which linear layers have their inputs in fp32 by the plan, for `PlannedCall`."""
        # Where bf16 is emulated, fp32 stands for it, and nothing is kept wide.
        return self.reads_fp32 if plan.wide.get(self.body.call) else lambda _: False

    def reads_fp32(self, linear: fx.Node) -> bool:
        """Whether the function computes with a linear layer's input in fp32, as it does with what fp16 cannot hold."""
        x, value = linear.all_input_nodes[0], self.values.get(linear)
        while x not in self.values and x.all_input_nodes:
            x = x.all_input_nodes[0]
        read = {self.values.get(x, x.name)}
        for node in self.nodes_of(value) if value is not None else ():
            for name in read.intersection(node.input):
                if node.op_type not in _HAND_ON:
                    return self.body.type_of(name) == onnx.TensorProto.FLOAT
                read.update(node.output)
        return False

    def nodes_of(self, value: str) -> list[onnx.NodeProto]:
        """The function's nodes that make a value since the last ones that the eager model has too, in order."""
        producers = {out: i for i, n in enumerate(self.body.function.node) for out in n.output}
        known, wanted, todo = set(self.values.values()), set(), [value]
        while todo:
            at = producers.get(todo.pop())
            if at is None or at in wanted:
                continue
            wanted.add(at)
            todo += [v for v in self.body.function.node[at].input if v not in known]
        return [self.body.function.node[i] for i in sorted(wanted)]


def compare_nodes(
    matching: Matching,
    planned: PlannedCall,
    activations: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    compute: torch.dtype,
    wide: Collection[str],
    tolerance: Tolerance,
) -> list[Compared]:
    """Compare every value of a call that the engine gave, in the order in which the eager model computes them.

    Args:
        activations: of the call, by name, as the engine has them.
        received: the engine's values, by their names in the function.
        compute: what the engine rounds values to.
        wide: operators whose values it keeps in fp32.
    """
    made: list[Compared] = []
    slack: dict[fx.Node, float] = {}

    def tap(node: fx.Node, value: Tensor) -> Tensor:
        name = matching.values.get(node)
        theirs = received.get(name) if name is not None else None
        if name is None or theirs is None or not _has_values(value):
            return value
        if theirs.shape != value.shape:
            if node.name in matching.program.outputs:  # others may be the same numbers in another shape
                made.append(Compared(node, name, Errors(0.0, math.inf, math.inf), tolerance, passed=False))
            return value
        kept = node.name in wide or matching.program.outputs.get(node.name) in wide
        expected = value if kept else _rounded(value, compute)
        errors = compare(theirs, expected)
        bound = _loosened(tolerance, sum(slack.get(n, 0.0) for n in matching.made_of(node)))
        passed = within(errors, bound)
        element = None if passed else _first(theirs, expected, bound.max_rel_l2)
        made.append(Compared(node, name, errors, bound, passed, element))
        usable = errors.nonfinite == 0
        return theirs.to(value.dtype) if usable else value

    planned.run(activations, tap, slack)
    return made


def _loosened(tolerance: Tolerance, slack: float) -> Tolerance:
    """Room for values that are rounded the other way: both ways are right, so twice what lies between them."""
    if not slack:
        return tolerance
    room = tolerance.max_rel_l2 + 2 * slack
    return replace(tolerance, max_rel_l2=room, min_cosine=min(tolerance.min_cosine, 1 - room**2))


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.bool


def _rounded(value: Tensor, compute: torch.dtype) -> Tensor:
    """As the engine would store it; what would overflow stays as it is, and is out of any tolerance."""
    if not value.is_floating_point():
        return value
    narrow = value.to(compute).float()
    return narrow if bool(narrow.isfinite().all()) else value


def _first(received: Tensor, expected: Tensor, share: float) -> Element:
    theirs, wanted = received.double().flatten(), expected.double().flatten()
    typical = wanted.square().mean().sqrt()
    off = ~((theirs - wanted).abs() <= share * typical)  # NaN is off
    at = int(off.int().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), received.shape))
    return Element(index, float(theirs[at]), float(wanted[at]))
