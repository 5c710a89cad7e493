"""Are the two parts of a split graph the whole one, cut and joined again?

    whole = conditioning's calls + trunk's calls, and unpack(pack(modulations)) = modulations

Verification steps through the whole graph. What it says holds for the parts too if their calls are those of the whole
graph, and if what lies between them only moves numbers: this is looked at here, without any weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from mmdit_deploy.contract import TABLE
from mmdit_deploy.errors import GraphError

_MOVES = frozenset("Cast Concat Constant Reshape Slice Transpose Unsqueeze".split())
_TAKES = f"{TABLE}."  # begins the name of each node between the parts; that which makes a tensor is named after it
_SAMPLES = 3
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


def check_parts(whole: onnx.ModelProto, conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> None:
    """Check that two parts are a whole graph of the same dialect. Casts between float types are looked through.

    Raises:
        GraphError: a call is missing, changed, added or in both, an input or output is another one, or the table
            between the parts mixes numbers up.
    """
    for problem in _problems(whole, conditioning, trunk):
        raise GraphError(
            "the conditioning and the trunk are the calls of the whole graph, with the modulation table between them",
            received=problem,
            fix="export the bundle again; if that does not help, report this as a bug",
        )


def _problems(whole: onnx.ModelProto, conditioning: onnx.ModelProto, trunk: onnx.ModelProto) -> Iterator[str]:
    expected = _Calls(whole, [])
    parts = [_Calls(conditioning, _before(conditioning.graph)), _Calls(trunk, _after(trunk.graph))]
    for name, node in expected.nodes.items():
        holders = sum(name in part.nodes for part in parts)
        if holders != 1 and not _moves(node):
            yield f"{name} is in {'both parts' if holders else 'neither part'}"
    for part in parts:
        yield from part.named_alike()
        for name in part.nodes:
            if name not in expected.nodes or part.read_by(name) != expected.read_by(name):
                yield f"{name} is another call in its part, or reads something else"
        for what in ("weights", "functions", "opsets"):
            theirs = getattr(expected, what)
            for key, value in getattr(part, what).items():
                if theirs.get(key) != value:
                    yield f"of {what}, {key} is another one in its part"
    yield from _other_ends(expected, parts)
    yield from _mixed_up(*parts)


class _Calls:
    """The calls of a graph, and where what they read comes from.

    Args:
        between: nodes that put the table together or take it apart.
    """

    def __init__(self, model: onnx.ModelProto, between: Sequence[onnx.NodeProto]):
        self.graph = model.graph
        inside = {out for node in between for out in node.output}
        self.taken = {n.output[0]: n.name.removeprefix(_TAKES) for n in between if n.op_type == "Unsqueeze"}
        self.own = [n for n in model.graph.node if not _is_float_cast(n) and inside.isdisjoint(n.output)]
        self.nodes = {n.name: n for n in self.own}
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.functions = {(f.domain, f.name, f.overload): _body(f) for f in model.functions}
        self.opsets = _opsets(model.opset_import)
        self.producers = {out: (n, i) for n in model.graph.node for i, out in enumerate(n.output)}

    def named_alike(self) -> Iterator[str]:
        for name, count in Counter(node.name for node in self.own).items():
            if count > 1:
                yield f"{count} nodes have the name {name!r}"

    def read_by(self, name: str) -> object:
        node = self.nodes[name]
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        return node.op_type, node.domain, node.overload, attributes, [self.source(value) for value in node.input]

    def inputs(self) -> dict[str, object]:
        return {value.name: _element(value) for value in self.graph.input if value.name != TABLE}

    def outputs(self) -> dict[str, object]:
        """The type of each, and where it comes from."""
        outputs = [value for value in self.graph.output if value.name != TABLE]
        return {value.name: (_element(value), self.source(value.name)) for value in outputs}

    def source(self, value: str) -> tuple[str, int]:
        """The call that makes a value, and as which of its outputs; -1 of what no call makes."""
        while value in self.producers:
            if value in self.taken:
                return self.taken[value], 0  # the call that makes a modulation tensor has its name
            node, index = self.producers[value]
            if not _is_float_cast(node):
                return node.name, index
            value = node.input[0]
        return value, -1


def _other_ends(expected: _Calls, parts: Sequence[_Calls]) -> Iterator[str]:
    """Inputs and outputs of the parts, beside the table, that are not those of the whole graph."""
    for what, wanted, found in (
        ("input", expected.inputs(), [part.inputs() for part in parts]),
        ("output", expected.outputs(), [part.outputs() for part in parts]),
    ):
        for name in dict.fromkeys([*wanted, *(name for ends in found for name in ends)]):
            if [ends[name] for ends in found if name in ends] != [wanted.get(name)]:
                yield f"the {what} {name} is not in one part as it is in the whole graph"


def _element(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def _moves(node: onnx.NodeProto) -> bool:
    """Whether a node only moves numbers; a cast does where the type is one of floats."""
    return node.op_type in _MOVES and not node.domain and (node.op_type != "Cast" or _is_float_cast(node))


def _is_float_cast(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and not node.domain and any(a.name == "to" and a.i in _FLOATS for a in node.attribute)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {opset.domain: opset.version for opset in imports}


def _body(function: onnx.FunctionProto) -> object:
    """What a function computes, without what is only said of it."""
    nodes = []
    for node in function.node:
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        del plain.metadata_props[:]
        for attribute in plain.attribute:
            if attribute.HasField("t"):
                attribute.t.ClearField("name")
        nodes.append(plain.SerializeToString(deterministic=True))
    defaults = [a.SerializeToString(deterministic=True) for a in function.attribute_proto]
    ends = list(function.input), list(function.output)
    return *ends, list(function.attribute), defaults, _opsets(function.opset_import), nodes


def _mixed_up(conditioning: _Calls, trunk: _Calls) -> Iterator[str]:
    """Modulation tensors that do not come out of the table as they went in."""
    pack, unpack = _before(conditioning.graph), _after(trunk.graph)
    inside = {name for node in pack for name in node.output}
    put = dict.fromkeys(name for node in pack for name in node.input if name and name not in inside)
    given = {conditioning.source(name)[0]: name for name in put}
    taken = {tensor: value for value, tensor in trunk.taken.items()}
    if not taken or not given.keys() >= taken.keys():
        yield f"the trunk reads {', '.join(taken) or 'nothing'} of the table, which holds {', '.join(given)}"
        return
    rng = np.random.default_rng(0)
    made = _types(conditioning.graph)
    numbers = {tensor: _numbers(made[name], rng) for tensor, name in given.items()}
    fed = {name: numbers[tensor] for tensor, name in given.items()}
    table = _run(pack, [made[name] for name in given.values()], [made[TABLE]], fed)[0]
    types = _types(trunk.graph)
    out = _run(unpack, [types[TABLE]], [types[name] for name in taken.values()], {TABLE: table})
    for tensor, got in zip(taken, out, strict=True):
        if not np.array_equal(got, numbers[tensor]):
            yield f"{tensor} comes out of the table as something else"


def _before(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that put the table together, of what calls make."""
    wanted, found = {TABLE}, []
    for node in reversed(graph.node):
        if _moves(node) and wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]


def _after(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that take the table apart, for calls to read."""
    known, found = {TABLE}, []
    constant = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        apart = _moves(node) and node.op_type != "Constant" and known.intersection(node.input)
        if apart and (known | constant).issuperset(node.input):
            known.update(node.output)
            found.append(node)
    read = {name for node in found for name in node.input}
    return [node for node in graph.node if node.op_type == "Constant" and node.output[0] in read] + found


def _types(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}


def _numbers(value: onnx.ValueInfoProto, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers, which every type holds; a row for each of `_SAMPLES`, or two."""
    dims = [d.dim_value or _SAMPLES * len(d.dim_param.split(" + ")) for d in value.type.tensor_type.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return rng.integers(-128, 128, dims).astype(dtype)


def _run(
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    values: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    graph = helper.make_graph(nodes, "table", list(inputs), list(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return list(ReferenceEvaluator(model).run(None, dict(values)))
