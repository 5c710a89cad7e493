"""Q and K of all tokens normalized together, in two kernels instead of six.

    img QKV ─ Split ─ RMSNorm(q), RMSNorm(k) ┐                   img QKV ┐
                                             ├ Concat × 2   ⇒            ├ MMDiTJointQKNorm ─ q, k
    txt QKV ─ Split ─ RMSNorm(q), RMSNorm(k) ┘                   txt QKV ┘

TensorRT's compiler fuses a norm's reduction with what follows it only where that neither concatenates, slices nor
transposes; otherwise it writes the norm's input anew, four times here, and in fp32. So there is one reduction, of the
heads of both streams as the projections write them, which gives nothing but a number per head; scaling, concatenation
and the transposes of Q, K and V are then one kernel. `bench/tensorrt_graph.md` has what was tried.

The numbers are those of RMSNormalization: in fp32, rounded, then times the weight. A block with one stream (FLUX's
single ones, SD3.5's second attention) becomes `MMDiTQKNorm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.passes import Pass, like

QK_NORM = {1: "MMDiTQKNorm", 2: "MMDiTJointQKNorm"}  # by the number of streams
NORMS = {name: 2 * streams for streams, name in QK_NORM.items()}  # that a call computes, by one reduction
OPSET = 23


@dataclass(frozen=True)
class _Heads:
    """What one reduction can serve: equal sizes, epsilon and element type."""

    heads: int
    head_dim: int
    parts: int  # that the projection is split into
    epsilon: float
    dtype: ir.DataType


@dataclass(frozen=True)
class _Part:
    """A norm of one of the parts that a projection is split into.

    Args:
        output: normed, [B, N, H, D].
        split: of the projection, [B, N, the widths of all parts].
        weight: [D]
        index: of the part.
    """

    output: ir.Value
    split: ir.Node
    projection: ir.Value
    weight: ir.Value
    index: int
    heads: _Heads


@dataclass(frozen=True)
class _Target:
    """A value that is Q or K of all tokens: a norm, or the concatenation of one from each stream."""

    value: ir.Value
    streams: tuple[_Part, ...]

    @property
    def index(self) -> int:
        return self.streams[0].index

    @property
    def projections(self) -> tuple[ir.Value, ...]:
        return tuple(part.projection for part in self.streams)


def _join(model: ir.Model) -> int:
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    count = 0
    for scope in scopes:
        by_projections: dict[tuple[ir.Value, ...], list[_Target]] = {}
        for target in _targets(scope):
            by_projections.setdefault(target.projections, []).append(target)
        for targets in by_projections.values():
            q_and_k = sorted(targets, key=lambda target: target.index)
            if [target.index for target in q_and_k] == [0, 1]:
                count += _replace(model, scope, *q_and_k)
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _targets(scope: ir.Graph | ir.Function) -> list[_Target]:
    parts = {node.outputs[0]: part for node in scope for part in [_part(node)] if part is not None}
    joint = []
    for node in scope:
        if node.op_type == "Concat" and len(node.inputs) == 2 and _int(node, "axis", 0) == 1:
            streams = tuple(parts[value] for value in node.inputs if value in parts)
            if len(streams) == 2 and len({(part.index, part.heads) for part in streams}) == 1:
                joint.append(_Target(node.outputs[0], streams))
    joined = {part.output for target in joint for part in target.streams}
    return joint + [_Target(value, (part,)) for value, part in parts.items() if value not in joined]


def _part(norm: ir.Node) -> _Part | None:
    """A norm over the heads of a part of a projection: RMSNormalization(Reshape(Split(projection)[index]))."""
    view = _producer(norm.inputs[0], "Reshape") if norm.op_type == "RMSNormalization" else None
    split = _producer(view.inputs[0], "Split") if view is not None else None
    if view is None or split is None or view.outputs[0].shape is None or view.outputs[0].dtype is None:
        return None
    shape, dtype = view.outputs[0].shape, view.outputs[0].dtype
    projection, weight = split.inputs[0], norm.inputs[1]
    widths = [out.shape[-1] if out.shape is not None else None for out in split.outputs]
    if (
        projection is None
        or weight is None
        or len(shape) != 4
        or projection.shape is None
        or len(projection.shape) != 3
    ):
        return None
    index = next(i for i, out in enumerate(split.outputs) if out is view.inputs[0])
    heads, head_dim = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(head_dim, int) or widths[:2] != [heads * head_dim] * 2:
        return None
    if not all(isinstance(width, int) and width % head_dim == 0 for width in widths):
        return None
    if _int(split, "axis", 0) not in (-1, 2) or list(shape)[:2] != list(projection.shape)[:2]:
        return None
    if _int(norm, "axis", -1) not in (-1, 3) or _int(norm, "stash_type", 1) != ir.DataType.FLOAT:
        return None
    if "epsilon" in norm.attributes and norm.attributes["epsilon"].is_ref():
        return None
    alike = _Heads(heads, head_dim, len(widths), norm.attributes.get_float("epsilon", 1e-5), dtype)
    return _Part(norm.outputs[0], split, projection, weight, index, alike)


def _replace(model: ir.Model, scope: ir.Graph | ir.Function, q: _Target, k: _Target) -> int:
    name = QK_NORM[len(q.streams)]
    function = _function(name, len(q.streams), q.streams[0].heads)
    _type(function, q.value, q.streams[0].heads)
    known = model.functions.get(function.identifier())
    if q.value.is_graph_output() or k.value.is_graph_output():
        return 0  # which has its name
    if q.streams[0].heads != k.streams[0].heads or (known is not None and _text(known) != _text(function)):
        return 0  # a name has one body
    model.functions[function.identifier()] = function
    weights = [part.weight for target in (q, k) for part in target.streams]
    call = ir.node(
        name, [*q.projections, *weights], domain=DOMAIN, num_outputs=2, name=f"{q.value.name}_{k.value.name}"
    )
    # Behind all that it reads; splits follow the projections.
    read = {part.split for part in q.streams} | {weight.producer() for weight in weights}
    scope.opset_imports.setdefault(DOMAIN, 1)
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    scope.insert_after([node for node in scope if node in read][-1], call)
    for output, target in zip(call.outputs, (q, k), strict=True):
        output.name = f"{target.value.name}.normed"
        like(output, target.value, list(target.value.shape or ()))
        ir.convenience.replace_all_uses_with(target.value, output)
    return 1


def _text(function: ir.Function) -> bytes:
    return ir.to_proto(function).SerializeToString(deterministic=True)


def _function(name: str, count: int, like_all: _Heads) -> ir.Function:
    """The body, for so many streams; Q is the first part of each projection, and K the second."""
    heads, head_dim, streams = like_all.heads, like_all.head_dim, range(count)
    inputs = [f"x{i}" for i in streams] + [f"{part}{i}" for part in ("wq", "wk") for i in streams]
    lines = [
        f"rows = Constant <value_ints = [0, 0, -1, {head_dim}]> ()",
        "zero = Constant <value_ints = [0]> ()",
        "last = Constant <value_ints = [-1]> ()",
        "head_axis = Constant <value_ints = [2]> ()",
        f"normed_heads = Constant <value_ints = [{2 * heads}]> ()",
        f"epsilon = Constant <value_float = {like_all.epsilon:.9g}> ()",
        *(f"heads{i} = Reshape (x{i}, rows)" for i in streams),
        *(f"qk{i} = Slice (heads{i}, zero, normed_heads, head_axis)" for i in streams),
        f"qk = {_joined('qk{}', streams)}",
        "wide = Cast <to = 1> (qk)",
        "squares = Mul (wide, wide)",
        "mean = ReduceMean <keepdims = 1> (squares, last)",
        "guarded = Add (mean, epsilon)",
        "root = Sqrt (guarded)",
        "inverse = Reciprocal (root)",
        "inverse_q, inverse_k = Split <axis = 2, num_outputs = 2> (inverse)",
    ]
    for j, out in enumerate("qk"):
        lines += [
            f"begin_{out} = Constant <value_ints = [{j * heads * head_dim}]> ()",
            f"end_{out} = Constant <value_ints = [{(j + 1) * heads * head_dim}]> ()",
            *(f"flat_{out}{i} = Slice (x{i}, begin_{out}, end_{out}, head_axis)" for i in streams),
            *(f"part_{out}{i} = Reshape (flat_{out}{i}, rows)" for i in streams),
            f"joined_{out} = {_joined(f'part_{out}{{}}', streams)}",
            f"wide_{out} = Cast <to = 1> (joined_{out})",
            f"scaled_{out} = Mul (wide_{out}, inverse_{out})",
            f"narrow_{out} = Cast <to = {like_all.dtype.value}> (scaled_{out})",
            *_weight_lines(out, streams, head_dim),
            f"{out} = Mul (narrow_{out}, weight_{out})",
        ]
    text = f"{name} ({', '.join(inputs)}) => (q, k) {{\n" + "\n".join(lines) + "\n}"
    header = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(header + text))
    for node in function:  # the engine's list of kernels names them
        node.name = node.outputs[0].name
    return function


def _type(function: ir.Function, q: ir.Value, heads: _Heads) -> None:
    """Say what the body's values are: the bytes of kernels are counted by that."""
    tokens, wide = list(q.shape or ())[:2], ir.TensorType(ir.DataType.FLOAT)
    narrow = ir.TensorType(heads.dtype)
    both, one, dim = 2 * heads.heads, heads.heads, heads.head_dim
    shapes = {
        "qk": (narrow, [both, dim]),
        **{name: (wide, [both, dim]) for name in ("wide", "squares")},
        **{name: (wide, [both, 1]) for name in ("mean", "guarded", "root", "inverse")},
        **{f"inverse_{part}": (wide, [one, 1]) for part in "qk"},
        **{f"{name}_{part}": (wide, [one, dim]) for name in ("wide", "scaled") for part in "qk"},
        **{f"{name}_{part}": (narrow, [one, dim]) for name in ("joined", "narrow") for part in "qk"},
    }
    for node in function:
        for value in node.outputs:
            if value.name in shapes:
                value.type, last = shapes[value.name]
                value.shape = ir.Shape([*tokens, *last])


def _joined(name: str, streams: range) -> str:
    if len(streams) == 1:
        return f"Identity ({name.format(0)})"
    return f"Concat <axis = 1> ({', '.join(name.format(i) for i in streams)})"


def _weight_lines(out: str, streams: range, head_dim: int) -> Iterator[str]:
    """The weight of each token, where the streams have their own."""
    if len(streams) == 1:
        yield f"weight_{out} = Identity (w{out}0)"
        return
    yield f"one_{out} = Constant <value_ints = [1]> ()"
    yield f"width_{out} = Constant <value_ints = [{head_dim}]> ()"
    for i in streams:
        yield f"tokens_{out}{i} = Shape <start = 1, end = 2> (x{i})"
        yield f"shape_{out}{i} = Concat <axis = 0> (one_{out}, tokens_{out}{i}, one_{out}, width_{out})"
        yield f"weight_{out}{i} = Expand (w{out}{i}, shape_{out}{i})"
    yield f"weight_{out} = {_joined(f'weight_{out}{{}}', streams)}"


def _int(node: ir.Node, name: str, default: int) -> int | None:
    """An attribute; None where it is the one of the function around it, which may be anything."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op and node.domain == "" else None


joint_qk_norm = Pass("joint Q and K norm", _join)
