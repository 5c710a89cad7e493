"""Weights beside an ONNX file: what its references may say, and whether the bytes are there. No weight is read.

    location, offset, length  ⇒  a file in the model's folder, reached without links, with that many bytes there

ONNX's own checker takes negative offsets, and spans that end after the file: so this comes before any library.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.checks.element_types import nbytes_of
from mmdit_deploy.graph.walk import model_tensors, named

_BESIDE = "the external weights of an ONNX model must lie in its folder, in plain files"
_SAVE_AGAIN = "save the model again, with its weights in one file beside it"
_COPY = "copy the file itself there (cp -L), or save the model again with its weights beside it"
_DIGITS = 19  # of the largest int64


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


def external_files(model: onnx.ModelProto) -> tuple[ExternalFile, ...]:
    """The files that hold a model's weights, sorted by name."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor, _ in model_tensors(model):
        if is_external(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location, length = entries.get("location", ""), entries.get("length", "")
            tensors[location] += 1
            nbytes[location] += int(length) if _is_number(length) else 0
    return tuple(ExternalFile(name, count, nbytes[name]) for name, count in sorted(tensors.items()))


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data lie outside of the file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def is_beside_model(location: str) -> bool:
    """Whether a reference stays within the model's folder, as ONNX demands, on every system."""
    path, windows = PurePosixPath(location), PureWindowsPath(location)
    leaves = path.is_absolute() or windows.drive or windows.root or ".." in path.parts
    return bool(path.parts) and not leaves and "\\" not in location and "\0" not in location


def check_external_data(model: onnx.ModelProto, folder: Path) -> None:
    """Check every reference to weights outside of the file.

    Args:
        model: parsed, with tensors that `mmdit_deploy.graph.checks.tensor_data` has checked.
        folder: of the file, which references are relative to.

    Raises:
        UsageError: a reference is malformed, leads out of the folder or over a link, or the bytes are not there.
    """
    sizes: dict[str, int] = {}
    for tensor, what in model_tensors(model):
        if not is_external(tensor):
            continue
        entries = _entries(tensor, what)
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _size(folder, location, what)
        _check_span(tensor, what, entries, sizes[location])


def _entries(tensor: onnx.TensorProto, what: str) -> dict[str, str]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        raise UsageError(
            "a reference to external weights must say each thing once",
            received=f"{what} says {', '.join(named(e.key) for e in tensor.external_data)}",
            fix=_SAVE_AGAIN,
        )
    for key in ("offset", "length"):
        if key in entries and not _is_number(entries[key]):
            raise UsageError(
                f"the {key} of external weights must be a count of bytes: digits only, below 2^63",
                received=f"{what} has the {key} {named(entries[key])}",
                fix=_SAVE_AGAIN,
            )
    return entries


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS and int(text) < 2**63


def _size(folder: Path, location: str, what: str) -> int:
    """Of the file that a reference names.

    Raises:
        UsageError: it is not a plain file in the folder.
    """

    def refused(found: str, fix: str) -> UsageError:
        return UsageError(_BESIDE, received=f"{what} refers to {named(location)}{found}", fix=fix)

    if not is_beside_model(location):
        raise refused(", which names no file in the folder", _SAVE_AGAIN)
    path = folder
    try:
        for part in PurePosixPath(location).parts:
            path = path / part
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise refused(f": {path} is a symbolic link", _COPY)
    except FileNotFoundError as error:
        raise refused(
            f", and {path} does not exist", "put the model's weights files beside it, under the names that it uses"
        ) from error
    except OSError as error:
        raise refused(f": {error.strerror}", "check the path and its permissions") from error
    if not stat.S_ISREG(found.st_mode):
        raise refused(f": {path} is {'a folder' if stat.S_ISDIR(found.st_mode) else 'no regular file'}", _SAVE_AGAIN)
    if found.st_nlink > 1:
        raise refused(f": {path} is a hard link: it has {found.st_nlink} names", _COPY)
    if not os.access(path, os.R_OK):
        raise refused(f": {path} cannot be read", "check its permissions")
    return found.st_size


def _check_span(tensor: onnx.TensorProto, what: str, entries: Mapping[str, str], size: int) -> None:
    """Spans may overlap, and a file may hold more than the model needs."""
    need = nbytes_of(tensor.data_type, tensor.dims)
    offset = int(entries.get("offset", "0"))
    length = int(entries["length"]) if "length" in entries else need
    if need is None or length is None:
        raise UsageError(
            "strings cannot be external weights: ONNX gives them no layout in a file",
            received=what,
            fix="save the model with its strings in the ONNX file",
        )
    if length != need:
        raise UsageError(
            "the length of external weights must be what their shape and type take",
            received=f"{what} has the length {length}, and takes {need} bytes",
            fix=_SAVE_AGAIN,
        )
    if offset + length > size:
        raise UsageError(
            "external weights must lie within their file",
            received=f"{what} is at {offset} to {offset + length} of {named(entries['location'])}, "
            f"which has {size} bytes",
            fix="get the weights file again: it is too short, or another model's",
        )
