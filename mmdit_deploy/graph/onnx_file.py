"""ONNX files that nobody vouches for: parsed, and made ready for passes, without their weights."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.calls import callees_first, functions_of
from mmdit_deploy.graph.checks.external_data import is_external
from mmdit_deploy.graph.function_types import type_function_inputs
from mmdit_deploy.graph.walk import model_tensors, named

MAX_BYTES = 2**31 - 1  # protobuf's limit
_AGAIN = "get the file again, or export it again"


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
        raise _not_onnx(path, f"{size} bytes that do not parse: not ONNX, truncated, or nested too deep") from error
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
    _check_texts(model)
    return model


def _not_onnx(path: Path, received: str) -> UsageError:
    return UsageError(f"{path} must be a whole ONNX model", received=received, fix=_AGAIN)


def _check_texts(message: Message) -> None:
    """Protobuf hands out text that is no UTF-8 as bytes, which nothing that follows expects."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            texts = [value] if isinstance(value, str | bytes) else value
            broken = next((text for text in texts if isinstance(text, bytes)), None)
            if broken is not None:
                received = f"the {field.name} {named(broken)}"
                raise UsageError("text in an ONNX file must be UTF-8", received=received, fix=_AGAIN)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for nested in [value] if isinstance(value, Message) else value:
                _check_texts(nested)


def inline_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the tensors that lie in the file itself."""
    return sum(tensor.ByteSize() for tensor, _ in model_tensors(model) if not is_external(tensor))


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
    for graph in (result.graph, *(function.graph for function in result.functions.values())):
        ir.external_data.set_base_dir(graph, folder)
    type_function_inputs(result, reversed(callees_first(functions_of(model))))
    return result


__all__ = ["MAX_BYTES", "inline_bytes", "read_onnx", "to_ir"]
