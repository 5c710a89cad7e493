"""A call of a graph with the values inside its function brought out.

    [blocks.3] MMDiTJointBlock(img, txt, …, weights)   ⇒   the function's nodes, each value under "blocks.3/<its name>"

A runtime inlines functions anyway. What it fuses across a value that is brought out, it no longer can: the values are
those of the graph's nodes, one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.extract import extract_call
from mmdit_deploy.model import Call
from mmdit_deploy.runtime import open_session
from mmdit_deploy.runtime.ort import run_for
from mmdit_deploy.verify.chains import TORCH_TYPES

# Where bf16 is emulated a value is rounded by two casts, and what others read has this suffix (`emulate_bf16`).
_READ_AS = ".f32"


@dataclass(frozen=True)
class Body:
    """The function that a call calls.

    Args:
        call: node name, e.g. ``blocks.3``.
        node: that calls it.
        function: called.
    """

    call: str
    node: onnx.NodeProto
    function: onnx.FunctionProto

    @staticmethod
    def of(model: onnx.ModelProto, call: str) -> Body:
        """The body of a call of a whole graph, or of one cut out of it.

        Raises:
            GraphError: there is no such call, or it calls no function of the graph.
        """
        node = next((n for n in model.graph.node if n.name == call), None)
        functions = {f.name: f for f in model.functions}
        if node is None or node.op_type not in functions:
            raise GraphError(
                f"the graph has one node per call, of a function of its own; {call!r} has none",
                received="no such node" if node is None else f"a node {node.op_type}",
                fix="export the bundle again",
            )
        return Body(call, node, functions[node.op_type])

    @property
    def made(self) -> frozenset[str]:
        """The values that the function makes, by their names in it."""
        return frozenset(out for n in self.function.node for out in n.output if out)

    def read_as(self, value: str) -> str | None:
        """The name of a value where others read it; None where the function does not have it."""
        return next((name for name in (f"{value}{_READ_AS}", value) if name in self.made), None)

    def outside(self, value: str) -> str:
        """The name that a value of the function has in the graph around it."""
        given = dict(zip(self.function.input, self.node.input, strict=False))
        given |= dict(zip(self.function.output, self.node.output, strict=False))
        return given.get(value) or (f"{self.call}/{value}" if value else "")

    def type_of(self, value: str) -> int:
        """ONNX's type of a value; 0 where the function does not say it."""
        return self._types.get(value, 0)

    @functools.cached_property
    def _types(self) -> dict[str, int]:
        return {v.name: v.type.tensor_type.elem_type for v in self.function.value_info}


class ExposedCalls:
    """A graph of a bundle, cut at its calls, that gives what is computed inside of them.

    Args:
        graph: weights by reference.
        folder: the weights file's.
        target: ``ort-cpu`` or ``ort-cuda``.
    """

    def __init__(self, graph: onnx.ModelProto, folder: Path, target: str):
        self._graph, self._folder, self._target = graph, folder, target

    def load(self, call: Call, wanted: Collection[str]) -> ExposedCall:
        """The call with its weights in memory.

        Args:
            wanted: values of its function; those that it does not make are left out.
        """
        part = extract_call(self._graph, call.path)
        body = Body.of(part, call.path)
        shown = _inline(part, body, sorted(body.made & set(wanted)))
        session = open_session(part.SerializeToString(), self._target, weights_folder=self._folder)
        return ExposedCall(session, body, shown)


class ExposedCall:
    """One call of a graph, loaded, with values inside of it as its outputs.

    Args:
        shown: by the value's name in the function, the output that it is.
    """

    def __init__(self, session: Any, body: Body, shown: Mapping[str, str]):
        self.body = body
        self._session, self._shown = session, shown
        self._inputs = [(i.name, TORCH_TYPES[i.type]) for i in session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Activations in, the values out by their names in the function, as wide as the graph has them."""
        fed = {name: t.to(dtype) for (name, dtype), t in zip(self._inputs, inputs, strict=True)}
        made = run_for(self._session, fed, sorted(set(self._shown.values())))
        return {value: made[name] for value, name in self._shown.items()}


def _inline(part: onnx.ModelProto, body: Body, wanted: Sequence[str]) -> dict[str, str]:
    """Put the function's nodes in the place of its call; the values wanted become the outputs."""
    graph, node = part.graph, body.node
    at = next(i for i, n in enumerate(graph.node) if n.name == body.call)
    nodes = list(_renamed(body))
    shown = {value: body.outside(value) for value in wanted}
    for value in [v for v in wanted if body.type_of(v) == onnx.TensorProto.BFLOAT16]:
        # numpy has no bf16, and neither have the bindings of ONNX Runtime
        wide = f"{body.call}/{value}/fp32"
        nodes.append(onnx.helper.make_node("Cast", [shown[value]], [wide], to=onnx.TensorProto.FLOAT))
        shown[value] = wide
    around = [*graph.node[:at], *nodes, *graph.node[at + 1 :]]
    versions = {o.domain for o in part.opset_import}
    part.opset_import.extend(o for o in body.function.opset_import if o.domain not in versions)
    del graph.node[:], graph.output[:]
    graph.node.extend(around)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(shown.values()))
    remaining = [f for f in part.functions if f.name != node.op_type]
    del part.functions[:]
    part.functions.extend(remaining)
    return shown


def _renamed(body: Body) -> Iterator[onnx.NodeProto]:
    for i, node in enumerate(body.function.node):
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        renamed.name = f"{body.call}/{i}"
        renamed.input[:] = [body.outside(v) for v in node.input]
        renamed.output[:] = [body.outside(v) for v in node.output]
        yield renamed
