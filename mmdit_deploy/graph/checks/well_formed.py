"""Whether a parsed ONNX file is a graph that can be read: checked before any library that may crash on it sees it.

Nothing here recurses deeper than protobuf nests messages, and no weight outside of the file is touched.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import onnx

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.calls import check_calls
from mmdit_deploy.graph.checks.dataflow import check_function, check_graph
from mmdit_deploy.graph.checks.element_types import KNOWN
from mmdit_deploy.graph.checks.external_data import check_external_data
from mmdit_deploy.graph.checks.tensor_data import check_tensors
from mmdit_deploy.graph.walk import model_graphs, model_nodes, named, node_label

# Attributes of ONNX's ops that are element types.
_TYPES = frozenset({"to", "dtype", "output_dtype", "softmax_precision", "stash_type"})
_AGAIN = "get the file again, or export it again"


def check_well_formed(model: onnx.ModelProto, folder: Path) -> None:
    """Check a model from its header down to its weights.

    Args:
        model: from `mmdit_deploy.graph.onnx_file.read_onnx`.
        folder: of its file, which references to weights are relative to.

    Raises:
        UsageError: the first thing that is not as ONNX demands, with the names that are concerned.
    """
    _check_versions(model)
    _check_types(model)
    _check_ops(model)
    check_graph(model.graph)
    for function in model.functions:
        check_function(function)
    check_calls(model)
    check_tensors(model)
    check_external_data(model, folder)


def _check_versions(model: onnx.ModelProto) -> None:
    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise UsageError(
            f"the IR version of an ONNX file must be one that this onnx knows: 1 to {onnx.IR_VERSION}",
            received=f"{model.ir_version}",
            fix="pip install -U onnx where the file is newer, else export it again",
        )
    _check_opsets(model.opset_import, "the model")
    for function in model.functions:
        _check_opsets(function.opset_import, f"the function {named(function.name)}")


def _check_opsets(imports: Sequence[onnx.OperatorSetIdProto], where: str) -> None:
    latest = onnx.defs.onnx_opset_version()
    versions: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain  # two names of one
        if versions.setdefault(domain, entry.version) != entry.version:
            raise UsageError(
                "an ONNX model must import each operator set in one version",
                received=f"{where} imports {domain or 'ai.onnx'!a} in {versions[domain]} and in {entry.version}",
                fix=_AGAIN,
            )
        if entry.version < 0 or (not domain and not 1 <= entry.version <= latest):
            raise UsageError(
                f"the opset of an ONNX model must be one that this onnx knows: 1 to {latest}",
                received=f"{where} imports {domain or 'ai.onnx'!a} in {entry.version}",
                fix="pip install -U onnx where the file is newer, else export it again, best with opset 23",
            )


def _check_types(model: onnx.ModelProto) -> None:
    """The type of an input must be said; all others follow, and may be left open."""
    values = [value for g in model_graphs(model) for value in (*g.input, *g.output, *g.value_info)]
    values += [value for function in model.functions for value in function.value_info]
    _check_element_types(model.graph.input, KNOWN)
    _check_element_types(values, KNOWN | {onnx.TensorProto.UNDEFINED})


def _check_element_types(values: Iterable[onnx.ValueInfoProto], allowed: Container[int]) -> None:
    for value in values:
        unknown = next((t for t in _element_types(value.type) if t not in allowed), None)
        if unknown is not None:
            raise UsageError(
                "a tensor must be of one of ONNX's element types",
                received=f"{named(value.name)} is of type {unknown}",
                fix=_AGAIN,
            )


def _element_types(type_: onnx.TypeProto) -> Iterator[int]:
    for field, value in type_.ListFields():
        if field.name in ("tensor_type", "sparse_tensor_type"):
            yield value.elem_type
        elif field.name == "map_type":
            yield value.key_type
            yield from _element_types(value.value_type)
        elif field.name in ("sequence_type", "optional_type"):
            yield from _element_types(value.elem_type)


def _check_ops(model: onnx.ModelProto) -> None:
    for node in model_nodes(model):
        if not node.op_type:
            raise UsageError("a node of an ONNX graph must name its op", received=node_label(node), fix=_AGAIN)
        if node.domain in ("", "ai.onnx"):
            _check_attributes(node)
    if model.training_info:
        raise UsageError(
            "a graph to be deployed must be one for inference",
            received="a model with training info, which would be lost",
            fix="export it for inference",
        )


def _check_attributes(node: onnx.NodeProto) -> None:
    """What ONNX's checker does not look at."""
    if node.op_type == "Constant" and len(node.attribute) != 1:
        raise UsageError(
            "a constant must have one value",
            received=f"{node_label(node)}, with {len(node.attribute)}",
            fix=_AGAIN,
        )
    for attribute in node.attribute:
        if attribute.name in _TYPES and attribute.type == onnx.AttributeProto.INT and attribute.i not in {0, *KNOWN}:
            raise UsageError(
                "a tensor must be of one of ONNX's element types",
                received=f"{attribute.name} of {node_label(node)} is type {attribute.i}",
                fix=_AGAIN,
            )
