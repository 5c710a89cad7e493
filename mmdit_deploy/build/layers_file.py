"""`layers.json`: what is in a target's engine files, written when they are built.

Looking into an engine means deserializing it, which runs what is in it, and needs its GPU and the very version of
TensorRT that built it. So every layer is recorded when it is built, beside the engines, and read from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any

from mmdit_deploy.atomic import write_whole
from mmdit_deploy.build.layers import EngineLayer
from mmdit_deploy.build.records import EngineRecord, SegmentRecord
from mmdit_deploy.checkpoint.strict_json import parse_json_object, quote
from mmdit_deploy.errors import BundleError, CheckpointError

FILE_NAME = "layers.json"
FORMAT = 2
_WITHOUT_SIZES = 1  # the format before elements, constants and FLOPs: still read
_MAX_BYTES = 32 * 2**20  # 24 blocks take 0.3 MB a profile
_REMEDY = "copy the bundle again, or export it again"


# What is read, by shape: a type, or `str | int`; a range of whole numbers; [S], a list of any length; (S, T), a list of
# two; {str: S}, any names; {"a": S}, an object with at least these names; _Maybe(S), S or null or no such name. `float`
# is a time, so not below zero.
@dataclass(frozen=True)
class _Maybe:
    shape: Any


_COUNT = range(2**63)
_COUNTS = {str: _COUNT}
_KERNELS = {"total": _COUNT, "by_type": _COUNTS, "by_call": _COUNTS}
_TENSOR = {"name": str, "axes": [str | int], "dtype": str}
_SEGMENT = {
    "file": str,
    "bytes": _COUNT,
    "calls": [str],
    "inputs": [_TENSOR],
    "outputs": [_TENSOR],
    "kernels": _KERNELS,
    "fused_attentions": _COUNTS,
    "fp8_attentions": _Maybe(_COUNTS),
    "quantized_products": _Maybe({str: _COUNTS}),
    "seconds": float,
    "activation_bytes": _Maybe(_COUNT),
    "floors": _Maybe([{str: {"bytes": _COUNT, "flops": _COUNT}}]),
}
_ENGINE = {
    "execution": str,
    "flavour": str,
    "version": str,
    "capabilities": [str],
    "attention": str,
    "profiles": [{str: (_COUNT, _COUNT, _COUNT)}],
    "bytes": _COUNT,
    "kernels": _KERNELS,
    "fused_attentions": _COUNTS,
    "fp8_attentions": _Maybe(_COUNTS),
    "quantized_products": _Maybe(_COUNTS),
    "segments": [_SEGMENT],
}
_LATER = ("fp8_attentions", "quantized_products")  # which a version wrote no record of that did not know them
_LAYER_TENSOR = (str, [range(-(2**63), 2**63)], str)
_SIZED_TENSOR = (*_LAYER_TENSOR, _Maybe(_COUNT))
_LAYER = {
    "name": str,
    "type": str,
    "profile": _COUNT,
    "sources": [(str, str)],
    "inputs": [_LAYER_TENSOR],
    "outputs": [_LAYER_TENSOR],
    "tactic": str,
}
_SIZED_LAYER = {
    **_LAYER,
    "inputs": [_SIZED_TENSOR],
    "constants": _Maybe([_SIZED_TENSOR]),
    "outputs": [_SIZED_TENSOR],
    "flops": _Maybe(_COUNT),
}


def _document(layer: Any) -> dict[str, Any]:
    return {"target": str, "engine": dict, "files": {str: {"bytes": _COUNT, "sha256": str, "layers": [layer]}}}


_DOCUMENTS = {_WITHOUT_SIZES: _document(_LAYER), FORMAT: _document(_SIZED_LAYER)}


@dataclass(frozen=True)
class EngineFile:
    """One engine file, as it was when it was built.

    Args:
        segment: what it computes; its size is there.
        sha256: in lower-case hex.
        layers: of the engine, in its own order, those of all profiles.
    """

    segment: SegmentRecord
    sha256: str
    layers: tuple[EngineLayer, ...]

    @property
    def name(self) -> str:
        """In the target's folder, e.g. ``segment-0.engine``."""
        return PurePosixPath(self.segment.file).name


def write_layers(
    folder: Path,
    record: EngineRecord,
    layers: Mapping[str, Sequence[EngineLayer]],
    hashes: Mapping[str, tuple[int, str]],
) -> None:
    """Write a target's `layers.json`.

    Args:
        folder: the target's, where its engine files are.
        record: of the target.
        layers: by `SegmentRecord.file`.
        hashes: size in bytes and SHA-256 in lower-case hex, by `SegmentRecord.file`; more than these may be in it.

    Raises:
        KeyError: a segment has no layers, or no hash.
        ValueError: a file's size is not the one in the record.
        OSError: it cannot be written.
    """
    files = []
    for segment in record.segments:
        nbytes, sha256 = hashes[segment.file]
        if nbytes != segment.nbytes:
            raise ValueError(f"{segment.file} has {nbytes} bytes, and {segment.nbytes} in its record")
        # a line for each layer: people search it, and compare two of them
        lines = ",\n".join("   " + json.dumps(layer.to_json(), allow_nan=False) for layer in layers[segment.file])
        head = f'"bytes": {nbytes}, "sha256": {json.dumps(sha256)}, "layers": ['
        files.append(f"  {json.dumps(PurePosixPath(segment.file).name)}: {{{head}\n{lines}\n  ]}}")
    engine = json.dumps(record.to_json(), allow_nan=False)
    head = f' "format": {FORMAT},\n "target": {json.dumps(record.target)},\n "engine": {engine},\n'
    write_whole(folder / FILE_NAME, "{\n" + head + ' "files": {\n' + ",\n".join(files) + "\n }\n}\n")


def read_layers(path: Path) -> tuple[EngineRecord, tuple[EngineFile, ...]]:
    """Read a `layers.json`, strictly. The engine files are not looked at.

    Returns:
        The target's record, and its engine files in the record's order.

    Raises:
        BundleError: it is not there, or is not as `write_layers` writes it.
        OSError: it cannot be read.
    """
    document = _read_json(path)
    version = document.get("format")
    if type(version) is not int or version not in _DOCUMENTS:
        raise BundleError(
            f"{path} must have one of the formats that this version reads, {', '.join(map(str, _DOCUMENTS))}",
            received=f"format {quote(version)}",
            fix="use the version of mmdit-deploy that wrote the bundle, or export it again with this one",
        )
    problem = _mismatch(document, _DOCUMENTS[version], "")
    if problem is not None:
        raise _malformed(str(path), problem)
    record = read_record(document["target"], document["engine"], str(path))
    files = document["files"]
    segments = {PurePosixPath(segment.file).name: segment for segment in record.segments}
    sizes = {name: segment.nbytes for name, segment in segments.items()}
    if sizes != {name: file["bytes"] for name, file in files.items()} or len(segments) < len(record.segments):
        raise _malformed(str(path), f"the files {quote(sorted(files))} for the segments {quote(sorted(sizes))}")
    if any(layer["profile"] >= len(record.profiles) for file in files.values() for layer in file["layers"]):
        raise _malformed(str(path), f"a layer of a profile beyond the {len(record.profiles)} of the record")
    return record, tuple(
        EngineFile(segment, files[name]["sha256"], tuple(map(EngineLayer.from_json, files[name]["layers"])))
        for name, segment in segments.items()
    )


def read_record(target: str, data: Mapping[str, Any], where: str) -> EngineRecord:
    """A TensorRT target's entry in a manifest or a `layers.json`, as a record.

    Args:
        target: its name.
        data: the entry; it may hold more than a record's fields.
        where: the file it is from, for messages.

    Raises:
        BundleError: a field is missing or of another type than `EngineRecord.to_json` writes, or the counts do not add
            up.
    """
    where = f"{where}, engine {quote(target)}"
    problem = _mismatch(data, _ENGINE, "")
    if problem is not None:
        raise _malformed(where, problem)
    record = EngineRecord.from_json(target, data)
    again = record.to_json()
    for said, counted in ((data, again), *zip(data["segments"], again["segments"], strict=True)):
        for name in ("bytes", "kernels", "fused_attentions", *_LATER):
            if (found := said.get(name)) != counted[name] and (found is not None or counted[name]):
                raise _malformed(
                    where, f"{name} {quote(found)}, where what it is made of adds up to {quote(counted[name])}"
                )
    if not (record.segments and record.profiles and all(segment.calls for segment in record.segments)):
        raise _malformed(where, "no segment, no profile, or a segment without calls")
    if not all(1 <= r.min <= r.opt <= r.max for profile in record.profiles for r in profile.values()):
        raise _malformed(where, f"the profiles {quote(data['profiles'])}")
    if any(len(segment.floors) not in (0, len(record.profiles)) for segment in record.segments):
        raise _malformed(where, f"floors of another number than the {len(record.profiles)} profiles")
    return record


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise _malformed(str(path), "no such file" if not path.exists() else "no regular file")
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise BundleError(
            f"{path} has at most {_MAX_BYTES} bytes", received=f"{path.stat().st_size} bytes", fix=_REMEDY
        )
    try:
        return parse_json_object(raw, str(path), _REMEDY)
    except CheckpointError as error:
        raise BundleError(error.rule, received=error.received, fix=error.fix) from error


def _mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Where a JSON value is not of a shape, and what is there; None where it is."""
    parts: list[tuple[Any, Any, str]] | None = None
    match shape, value:
        case list(), list():
            parts = [(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value)]
        case tuple(), list() if len(value) == len(shape):
            parts = [(item, part, f"{where}[{i}]") for i, (item, part) in enumerate(zip(value, shape, strict=True))]
        case dict(), dict() if str in shape:
            parts = [(item, shape[str], f"{where}.{quote(name)}") for name, item in value.items()]
        case dict(), dict():
            missing = [name for name, part in shape.items() if name not in value and not isinstance(part, _Maybe)]
            if missing:
                return f"{where.lstrip('.') or 'the whole'}: no {', '.join(missing)}"
            parts = [(value.get(name), part, f"{where}.{name}") for name, part in shape.items()]
        case _Maybe(shape=inner), _:
            return None if value is None else _mismatch(value, inner, where)
        case (range(), int()) if type(value) is int and value in shape:  # True is none
            return None
        case _ if shape is float and type(value) in (int, float) and 0 <= value < 2**63:
            return None
        case ((type() | UnionType()), _) if shape is not float and isinstance(value, shape):
            return None
    if parts is None:
        return f"{where.lstrip('.') or 'the whole'}: {quote(value)}"
    return next((problem for part in parts if (problem := _mismatch(*part)) is not None), None)


def _malformed(where: str, received: str) -> BundleError:
    return BundleError(f"{where} must be as this version writes what it has built", received=received, fix=_REMEDY)
