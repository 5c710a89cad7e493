"""What is in a bundle, an engine, a checkpoint, an ONNX file or a safetensors file: as data.

Every byte of a bundle or an engine is hashed; of other weights files the headers are read, and a checkpoint's position
table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx

from mmdit_deploy.bundle.manifest import MANIFEST
from mmdit_deploy.cli.describe_bundle import describe_bundle
from mmdit_deploy.cli.describe_checkpoint import describe_checkpoint, describe_safetensors
from mmdit_deploy.cli.describe_engine import describe_engine
from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.calls import executed_ops
from mmdit_deploy.graph.checks.external_data import external_files, is_beside_model
from mmdit_deploy.graph.checks.well_formed import check_well_formed
from mmdit_deploy.graph.onnx_file import inline_bytes, read_onnx

_CHECKPOINT_MARKS = ("config.json", "model_index.json", "transformer")


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a bundle, a checkpoint, or a file, of the kind that its name ends with.

    Args:
        path: the folder or file.

    Returns:
        JSON values; ``kind`` is ``bundle``, ``checkpoint``, ``engine``, ``onnx`` or ``safetensors``.

    Raises:
        UsageError: it does not exist, or is none of these.
        BundleError, CheckpointError: it is one of these, and broken.
    """
    path = Path(path)
    if path.is_dir():
        if any((path / name).exists() for name in _CHECKPOINT_MARKS):
            return describe_checkpoint(path)
        if (path / MANIFEST).exists():
            return describe_bundle(path)
        raise UsageError(
            f"a bundle has a {MANIFEST}, and a diffusers checkpoint a config.json",
            received=f"the folder {path}, which has neither",
            fix="name the folder itself, not one around it or in it",
        )
    by_suffix = _FILES.get(path.suffix.lower())
    if by_suffix is not None:
        return by_suffix(path)
    if not path.exists():
        return describe_checkpoint(path)  # which fails, and knows what a name on a hub looks like
    raise UsageError(
        "what is inspected is a bundle, a checkpoint (a diffusers folder or a .safetensors file), or an .engine, .onnx "
        "or .safetensors file",
        received=f"the file {path}",
        fix="name one of these",
    )


def describe_onnx(path: Path) -> dict[str, Any]:
    """An ONNX file; its external weights are looked up, not read.

    ``problem`` says what is not as it must be in a model that can be parsed, else it is None.

    Raises:
        UsageError: it is no whole ONNX model, or its functions call each other in a circle.
    """
    model = read_onnx(path)
    constants = {initializer.name for initializer in model.graph.initializer}
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(model.graph.node),
        "functions": {function.name: len(function.node) for function in model.functions},
        "ops": executed_ops(model),
        "inputs": [_onnx_tensor(v) for v in model.graph.input if v.name not in constants],
        "outputs": [_onnx_tensor(v) for v in model.graph.output],
        "initializers": len(model.graph.initializer),
        "inline_bytes": inline_bytes(model),
        "external": [
            {
                "location": file.location,
                "tensors": file.tensors,
                "bytes": file.nbytes,
                "found": is_beside_model(file.location) and (path.parent / file.location).is_file(),
            }
            for file in external_files(model)
        ],
        "problem": _problem(model, path.parent),
    }


def _problem(model: onnx.ModelProto, folder: Path) -> str | None:
    try:
        check_well_formed(model, folder)
    except UsageError as error:
        return str(error)
    return None


def _onnx_tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    types = onnx.TensorProto.DataType
    name = types.Name(kind.elem_type).lower() if kind.elem_type in types.values() else f"type {kind.elem_type}"
    return {
        "name": value.name,
        "dtype": {"float": "float32", "double": "float64"}.get(name, name),  # as the other tables say
        "axes": [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in kind.shape.dim],
    }


_FILES = {
    ".engine": describe_engine,
    ".onnx": describe_onnx,
    ".safetensors": describe_safetensors,
    ".sft": describe_safetensors,
}
