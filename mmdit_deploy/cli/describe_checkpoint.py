"""What is in a checkpoint, or in a safetensors file that is none, as data: headers are read, and a position table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmdit_deploy.checkpoint import SafetensorsFile, StoredModel, TensorInfo, open_model
from mmdit_deploy.checkpoint.identify import identify
from mmdit_deploy.checkpoint.keys import Parameter, parameters
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import family_of

# Parts of the model, in the order of the data flow, by how the paths of their parameters begin.
_PARTS = {
    "conditioning": ("conditioning",),
    "modulations": ("modulations", "single_modulations", "shared_modulation", "final_modulation"),
    "embedders": ("img_embed", "txt_embed"),
    "joint blocks, image": ("blocks.*.img",),
    "joint blocks, text": ("blocks.*.txt",),
    "single blocks": ("single_blocks",),
    "final": ("final",),
}
# What they compute depends on the timestep, the guidance and the pooled text, and is the same for every token.
_CONDITIONING_ONLY = ("conditioning", "modulations")


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors are those of its architecture: what it is, and where its parameters are.

    Raises:
        CheckpointError: the files are broken, or the tensors are not those of one architecture.
    """
    model = open_model(path)
    family, tensors = family_of(model.spec), model.tensors
    parts = _parts(model)
    return {
        "kind": "checkpoint",
        "path": str(model.checkpoint.path),
        "family": family.name,
        "title": family.title,
        "class": family.config_class,
        "layout": model.layout,
        "spec": model.spec.to_json(),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "parts": parts,
        "conditioning_only": {
            field: sum(parts[part][field] for part in _CONDITIONING_ONLY) for field in ("parameters", "share", "bytes")
        },
        "dtypes": _dtypes(tensors.values()),
        "ignored": [{"name": c.name, "tensors": c.tensors, "bytes": c.nbytes} for c in model.ignored],
        "notes": list(model.notes),
        "files": {file.name: file.stat().st_size for file in model.checkpoint.files},
        "bytes": sum(info.nbytes for info in tensors.values()),
    }


def _parts(model: StoredModel) -> dict[str, dict[str, Any]]:
    table = parameters(model.spec)
    total = sum(parameter.numel for parameter in table)
    found: dict[str, dict[str, Any]] = {}
    for part in _PARTS:
        held = [parameter for parameter in table if _part(parameter) == part]
        if held:
            count = sum(parameter.numel for parameter in held)
            nbytes = sum(info.nbytes for parameter in held for info in model.stored(parameter))
            found[part] = {"parameters": count, "share": count / total, "bytes": nbytes}
    return found


def _part(parameter: Parameter) -> str:
    pattern = ".".join("*" if step.isdecimal() else step for step in parameter.path.split(".")) + "."
    return next(part for part, starts in _PARTS.items() if any(pattern.startswith(f"{s}.") for s in starts))


def describe_safetensors(path: Path) -> dict[str, Any]:
    """A safetensors file: as a checkpoint where it is one, else from its header, which was checked against the file.

    ``problem`` says why a file whose keys are those of a family that we know is no checkpoint of it, else it is None.

    Raises:
        CheckpointError: it is no safetensors file down to the last byte, or cannot be opened.
    """
    problem = None
    with SafetensorsFile(path) as file:
        if _is_known(file, path):
            try:
                return describe_checkpoint(path)
            except CheckpointError as error:
                problem = str(error)
        return {
            "kind": "safetensors",
            "path": str(path),
            "problem": problem,
            "bytes": file.size,
            "metadata": dict(file.metadata),
            "dtypes": _dtypes(file.tensors.values()),
            "parameters": sum(info.nbytes // info.dtype.itemsize for info in file.tensors.values()),
            "tensors": {
                key: {"dtype": _dtype(info), "shape": list(info.shape), "bytes": info.nbytes}
                for key, info in file.tensors.items()
            },
        }


def _is_known(file: SafetensorsFile, path: Path) -> bool:
    """Whether the keys are those of one family."""
    try:
        identify(file.tensors, str(path))
    except CheckpointError:
        return False
    return True


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _dtypes(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    """How many tensors there are of each dtype, and their bytes."""
    found: dict[str, dict[str, int]] = {}
    for info in tensors:
        entry = found.setdefault(_dtype(info), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    return found
