"""The fusion gate: what TensorRT was to fuse is fused in the engine that it built, or there is no engine.

It compares three things: what the spec implies of each call, the nodes of the graph that was built, and the engine's
layer list, whose kernels name the nodes and calls that they were made of.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from mmdit_deploy.build.build_log import REPORT
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.build.quantized import WORDS
from mmdit_deploy.errors import GraphError
from mmdit_deploy.graph.census import OPS
from mmdit_deploy.graph.lower.joint_qk_norm import NORMS

Source = tuple[str, str]  # a node and the call that it is in, as `EngineLayer.sources` has them
Expected = Mapping[str, Mapping[str, int]]  # nodes by call and op

_SHOWN = 8  # problems in one message


def check_fusion(
    graph: onnx.ModelProto,
    layers: Sequence[EngineLayer],
    expected: Expected,
    *,
    fused: bool,
    profiles: int,
    what: str,
    fp8: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Check that attentions and norms are in the engine as they should be, in the plan of every profile.

    - The graph has the attentions and norms of the spec, in each call.
    - Each attention is one fused kernel, of that node alone. Where the precision has none, it is written out:
      matrix products and one softmax, of that node alone.
    - Each attention that is planned in FP8 is a fused kernel that reads Q, K and V in FP8.
    - No softmax is computed elsewhere.
    - Each norm is in a kernel, and each LayerNormalization in one with its modulation.

    Args:
        graph: the model that the builder was given.
        layers: of the engine.
        expected: from `graph.census.implied_by_call`, for the calls that the graph should have.
        fused: whether the precision has a fused attention kernel; if not, attention must be written out.
        profiles: how many optimization profiles the engine has.
        what: the engine's name, for the message.
        fp8: how many attentions of each call are planned in FP8; none where it is not said.

    Returns:
        Fused attention kernels by block, of each profile; all 0 where attention is written out.

    Raises:
        GraphError: names the block, the node, and what became of it.
    """
    nodes = _nodes(graph)
    problems = [*_missing(nodes, expected), *_unplanned(nodes, {} if fp8 is None else fp8)]
    kernels = [layer for layer in layers if layer.is_kernel]
    blocks = [call for call, ops in expected.items() if ops.get("Attention")]
    planned = sorted({kernel.profile for kernel in kernels})
    if planned != list(range(profiles)):
        problems.append(f"kernels for the profiles {list(range(profiles))} expected; the engine has some for {planned}")
    for profile in planned:
        plan = _Plan([kernel for kernel in kernels if kernel.profile == profile], nodes)
        found = (*plan.attention_problems(fused), *plan.softmax_problems(blocks), *plan.norm_problems())
        problems += (f"{problem} (profile {profile})" if profiles > 1 else problem for problem in found)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        how = "is one fused kernel" if fused else "is written out as matrix products and one softmax"
        raise GraphError(
            f"{what}: each attention of the spec {how}, and each norm is part of a kernel",
            received="\n            ".join(problems[:_SHOWN] + more),
            fix=REPORT,
        )
    return {block: expected[block]["Attention"] if fused else 0 for block in blocks}


@dataclass(frozen=True)
class _Node:
    """A node of the graph, and the nodes that read its outputs, also in functions; casts are looked through."""

    op: str
    readers: tuple[Source, ...]
    count: int = 1  # of that op: one reduction may be several norms
    fp8: bool = False  # an attention's softmax: it is spelled out, and this node stands for it


def _nodes(graph: onnx.ModelProto) -> dict[Source, _Node]:
    """Every node that one run executes: those of a function once per call of it."""
    functions = {f.name: f for f in graph.functions}
    nodes: dict[Source, _Node] = {}

    def add(scope: Sequence[onnx.NodeProto], call: str, prefix: str, function: str = "") -> None:
        for node in scope:
            if node.op_type in functions:
                inner = f"{prefix}{node.name}/" if call else ""
                add(functions[node.op_type].node, call or node.name, inner, node.op_type)
            else:
                readers = tuple(
                    (prefix + name, call) for value in node.output for name in _readers(scope, value, functions)
                )
                nodes[prefix + node.name, call] = _made(node, scope, function, readers)

    add(graph.graph.node, "", "")
    return nodes


def _made(node: onnx.NodeProto, scope: Sequence[onnx.NodeProto], function: str, readers: tuple[Source, ...]) -> _Node:
    norms = NORMS.get(function, 0) if node.op_type == "ReduceMean" else 0
    if norms:
        return _Node("RMSNormalization", readers, norms)
    read_by = {reader.op_type for reader in scope if node.output[0] in reader.input}
    if node.op_type == "Softmax" and "QuantizeLinear" in read_by:
        return _Node("Attention", readers, fp8=True)
    return _Node(node.op_type, readers)


def _readers(scope: Sequence[onnx.NodeProto], value: str, functions: Mapping[str, onnx.FunctionProto]) -> Iterator[str]:
    for node in scope:
        if value not in node.input:
            continue
        if node.op_type == "Cast":
            yield from _readers(scope, node.output[0], functions)
        elif node.op_type in functions:
            body = functions[node.op_type]
            for given, taken in zip(node.input, body.input, strict=False):
                if given == value:
                    yield from (f"{node.name}/{name}" for name in _readers(body.node, taken, functions))
        else:
            yield node.name


def _missing(nodes: Mapping[Source, _Node], expected: Expected) -> Iterator[str]:
    """What the spec implies and the graph lacks, or has too much of."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (name, call), node in nodes.items():
        names[call, node.op] += [name] * node.count
    found = {call for _, call in nodes}
    for call in dict.fromkeys([*expected, *sorted(found)]):
        if call not in found:
            yield f"{call}: the graph has no such call; its calls are {', '.join(sorted(found - {''}))}"
            continue
        for op in OPS:
            want, got = expected.get(call, {}).get(op, 0), names[call, op]
            if want != len(got):
                listed = f" ({', '.join(got)})" if got else ""
                yield f"{call or 'the main graph'}: {want} {op} expected, {len(got)} in the graph{listed}"


def _unplanned(nodes: Mapping[Source, _Node], planned: Mapping[str, int]) -> Iterator[str]:
    """Attentions that are in FP8 in the graph or in the plan, and not in both."""
    found = Counter(call for (_, call), node in nodes.items() if node.fp8)
    for call in dict.fromkeys([*planned, *found]):
        if planned.get(call, 0) != found[call]:
            yield f"{call}: {planned.get(call, 0)} attentions planned in FP8, {found[call]} in the graph"


class _Plan:
    """The kernels of one profile, by the nodes that they were made of."""

    def __init__(self, kernels: Sequence[EngineLayer], nodes: Mapping[Source, _Node]):
        self.kernels, self.nodes = kernels, nodes
        self.of: dict[Source, list[EngineLayer]] = defaultdict(list)
        for kernel in kernels:
            for source in dict.fromkeys(kernel.sources):
                self.of[source].append(kernel)

    def attention_problems(self, fused: bool) -> Iterator[str]:
        for source in self._sources("Attention"):
            became = self.of[source]
            count = Counter(_part(kernel, source) for kernel in became)
            # One product is enough: for two tokens in all, the second becomes part of the softmax.
            right = (
                (count["fused"], count["softmax"], count["product"]) == (1, 0, 0)
                if fused
                else count["fused"] == 0 and count["softmax"] == 1 and count["product"] >= 1
            )
            if not right:
                wanted = "one fused attention kernel" if fused else "written out"
                yield f"{_shown(source)} (Attention) is not {wanted}; it became {_listed(became)}"
            elif self.nodes[source].fp8 and not all(map(_reads_fp8, became)):
                read = "; ".join(
                    f"{kernel.name} reads {', '.join(t.dtype for t in kernel.inputs)}" for kernel in became
                )
                yield f"{_shown(source)} (Attention) is to read Q, K and V in FP8; {read}"
        for kernel in self.kernels:
            if kernel.is_fused_attention and sum(self._op(s) == "Attention" for s in kernel.sources) != 1:
                made_of = ", ".join(map(_shown, kernel.sources)) or "no node"
                yield f"{kernel.name}: a fused kernel is made of one Attention, this one of {made_of}"

    def softmax_problems(self, blocks: Collection[str]) -> Iterator[str]:
        for kernel in self.kernels:
            ops = {self._op(source) for source in kernel.sources}
            calls = sorted({call for _, call in kernel.sources if call in blocks})
            if kernel.has_exponential and calls and "Attention" not in ops:
                made_of = ", ".join(map(_shown, kernel.sources))
                yield f"{', '.join(calls)}: {kernel.name} is a softmax on its own, made of {made_of}"

    def norm_problems(self) -> Iterator[str]:
        for op in ("RMSNormalization", "LayerNormalization"):
            for source in self._sources(op):
                became = self.of[source]
                if not became:
                    yield f"{_shown(source)} ({op}) is in no kernel"
                elif op == "LayerNormalization" and not self._with_reader(source):
                    readers = ", ".join(name for name, _ in self.nodes[source].readers)
                    yield f"{_shown(source)} ({op}) is not fused with {readers}; it became {_listed(became)}"

    def _sources(self, op: str) -> list[Source]:
        return [source for source, node in self.nodes.items() if node.op == op]

    def _op(self, source: Source) -> str | None:
        return self.nodes[source].op if source in self.nodes else None

    def _with_reader(self, source: Source) -> bool:
        readers = self.nodes[source].readers
        return any(reader in kernel.sources for kernel in self.of[source] for reader in readers)


def _reads_fp8(kernel: EngineLayer) -> bool:
    """Whether Q, K and V are in FP8, of a fused kernel; a mask is not."""
    of_it = kernel.is_fused_attention
    return not of_it or sum(tensor.dtype in WORDS["fp8"] for tensor in kernel.inputs) >= 3


def _part(kernel: EngineLayer, attention: Source) -> str:
    """What of an attention a kernel computes."""
    if kernel.is_fused_attention:
        return "fused"
    if kernel.has_exponential:
        return "softmax"
    # A projection may scale or move Q on its way out: only a product of nothing else is one of the attention.
    return "product" if kernel.is_product and set(kernel.sources) == {attention} else "copy"


def _shown(source: Source) -> str:
    name, call = source
    return f"{call or 'the main graph'}: {name}"


def _listed(kernels: Iterable[EngineLayer]) -> str:
    return ", ".join(f"{kernel.name} ({kernel.type})" for kernel in kernels) or "nothing"
