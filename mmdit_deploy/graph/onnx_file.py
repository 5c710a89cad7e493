"""ONNX files that nobody vouches for: opened without their weights, counted without running anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.function_types import type_function_inputs

MAX_BYTES = 2**31 - 1  # protobuf's limit
_MANY = 10**15  # counts beyond it only come from files made to be counted
_Key = tuple[str, str, str]  # domain, name and overload of a function
_AGAIN = "get the file again, or export it again"


@dataclass(frozen=True)
class ExternalFile:
    """A file beside the model that holds weights.

    Args:
        location: as the model names it, relative to the model's folder.
        tensors: how many refer to it.
        nbytes: bytes that they refer to; tensors without a length of their own are not counted.
    """

    location: str
    tensors: int
    nbytes: int


def read_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Parse an ONNX file. Weights outside of it are not touched.

    Args:
        path: the file.

    Raises:
        UsageError: it cannot be read, is larger than ONNX files can be, or is not a whole ONNX model.
    """
    path = Path(path)
    try:
        if not path.is_file():
            found = "is no regular file" if path.exists() else "does not exist"
            raise UsageError("an ONNX model is a file", received=f"{path} {found}", fix="check the path")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(
                f"an ONNX file has at most {MAX_BYTES} bytes: protobuf ends there",
                received=f"{path} with {size} bytes",
                fix="save the model with its weights as external data",
            )
        content = path.read_bytes()
    except OSError as error:
        raise UsageError("an ONNX model must be readable", received=str(error), fix="check its permissions") from error
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise _not_onnx(path, f"{size} bytes that do not parse: not ONNX, or truncated") from error
    # Protobuf takes many a byte string for a message, and one that is cut between two fields for a whole one.
    lacking = [
        what
        for what, there in (
            ("IR version", model.ir_version > 0),
            ("graph", model.HasField("graph")),
            ("opset import", len(model.opset_import) > 0),
            ("outputs", len(model.graph.output) > 0),
        )
        if not there
    ]
    if lacking:
        raise _not_onnx(path, f"{size} bytes without {', '.join(lacking)}: not ONNX, or truncated")
    return model


def _not_onnx(path: Path, received: str) -> UsageError:
    return UsageError(f"{path} must be a whole ONNX model", received=received, fix=_AGAIN)


def external_files(model: onnx.ModelProto) -> tuple[ExternalFile, ...]:
    """The files that hold a model's weights, sorted by name."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location, length = entries.get("location", ""), entries.get("length", "")
            tensors[location] += 1
            nbytes[location] += int(length) if length.isdecimal() and len(length) < 20 else 0
    return tuple(ExternalFile(name, count, nbytes[name]) for name, count in sorted(tensors.items()))


def is_beside_model(location: str) -> bool:
    """Whether a reference stays within the model's folder, as ONNX demands."""
    path = PurePosixPath(location)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in location


def inline_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the tensors that lie in the file itself."""
    return sum(t.ByteSize() for t in _tensors(model) if t.data_location != onnx.TensorProto.EXTERNAL)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    def of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for graph in _subgraphs(attribute):
                    yield from of_graph(graph)

    def of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
        yield from of_nodes(graph.node)

    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


def _subgraphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def executed_ops(model: onnx.ModelProto) -> dict[str, int]:
    """Nodes by op type that one run executes: a function's nodes count once per call, a branch's nodes once.

    Each function is counted once, however often it is called: a file of a few kilobytes may nest calls so
    that they are more than anybody can count one by one. Op types of domains other than ONNX's own are
    written with their domain, as ``com.microsoft.MultiHeadAttention``.

    Raises:
        UsageError: functions call each other in a circle.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    counted: dict[_Key, Counter[str]] = {}
    for key in _callees_first(functions):
        counted[key] = _count(functions[key].node, counted)
    return dict(sorted(_count(model.graph.node, counted).items()))


def _count(nodes: Iterable[onnx.NodeProto], functions: Mapping[_Key, Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for node in _all_nodes(nodes):
        body = functions.get(_called(node))
        if body is not None:
            total.update(body)
        else:
            own = node.domain in ("", "ai.onnx")
            total[node.op_type if own else f"{node.domain}.{node.op_type}"] += 1
    return Counter({op: min(count, _MANY) for op, count in total.items()})


def _called(node: onnx.NodeProto) -> _Key:
    return node.domain, node.op_type, node.overload


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their branches and loop bodies. Protobuf's own limit bounds the nesting."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _subgraphs(attribute):
                yield from _all_nodes(graph.node)


def _callees_first(functions: Mapping[_Key, onnx.FunctionProto]) -> list[_Key]:
    callees = {
        key: {_called(node) for node in _all_nodes(function.node)} & functions.keys()
        for key, function in functions.items()
    }
    try:
        return list(TopologicalSorter(callees).static_order())
    except CycleError as error:
        raise UsageError(
            "functions of an ONNX model must not call each other in a circle",
            received=" calls ".join(ascii(key[1]) for key in reversed(error.args[1])),
            fix=_AGAIN,
        ) from error


def to_ir(model: onnx.ModelProto, folder: Path) -> ir.Model:
    """The model for passes. External weights are read when, and only if, a pass looks at their values.

    Args:
        model: from `read_onnx`.
        folder: of the file, which its references are relative to.

    Raises:
        UsageError: the graph is malformed, or functions call each other in a circle.
    """
    try:
        result = ir.from_proto(model)
    except Exception as error:  # onnx_ir raises whatever the malformed part runs into
        raise UsageError(
            "the ONNX graph must be well-formed",
            received=f"{type(error).__name__}: {str(error)[:300]}",
            fix=_AGAIN,
        ) from error
    ir.external_data.set_base_dir(result.graph, folder)
    callees_first = _callees_first({(f.domain, f.name, f.overload): f for f in model.functions})
    type_function_inputs(result, reversed(callees_first))
    return result
