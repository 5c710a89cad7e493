"""What is in a TensorRT engine, as data: read from what was recorded when it was built, never from the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdit_deploy.build.layers_file import FILE_NAME, read_layers
from mmdit_deploy.bundle.files import FileRecord, hash_files
from mmdit_deploy.cli.describe_traffic import describe_traffic, gpus_data
from mmdit_deploy.errors import BundleError, UsageError


def describe_engine(path: Path) -> dict[str, Any]:
    """An engine file, if it is the one that the `layers.json` beside it is about.

    Returns:
        JSON values: ``engine`` is the target's `EngineRecord`, ``segment`` the file's index in its ``segments``, and
        ``layers`` are all `EngineLayer` of the file, those of all profiles. ``traffic`` is what its kernels move, by
        profile, from `describe_traffic`, and ``gpus`` are those that the estimates in it are for.

    Raises:
        UsageError: it is no file, or has no `layers.json` beside it.
        BundleError: the `layers.json` is broken, or about another file.
    """
    if not path.is_file():
        raise UsageError(
            f"an engine is a file, with the {FILE_NAME} of its build beside it",
            received=f"{path} {'is no regular file' if path.exists() else 'does not exist'}",
            fix="name one that mmdit-export wrote: BUNDLE/engines/TARGET/segment-0.engine",
        )
    path = path.resolve()
    beside = path.parent / FILE_NAME
    if not beside.exists():
        raise UsageError(
            f"an engine is read from the {FILE_NAME} of its build, beside it: deserializing it would run what is in "
            "it, and needs its GPU and the very version of TensorRT that built it",
            received=f"{path}, with no {FILE_NAME} beside it",
            fix="inspect it in its bundle, where mmdit-export put it",
        )
    record, files = read_layers(beside)
    position = next((i for i, file in enumerate(files) if file.name == path.name), None)
    if position is None:
        raise _another(beside, f"one of {', '.join(ascii(file.name) for file in files)}", ascii(path.name))
    file = files[position]
    expected = FileRecord(file.segment.nbytes, file.sha256)
    nbytes = path.stat().st_size
    if nbytes != expected.size:
        raise _another(beside, f"{path} of {expected.size} bytes", f"{nbytes} bytes")
    found = hash_files(path.parent, [path.name])[path.name]
    if found != expected:
        raise _another(beside, f"{path} with the SHA-256 {ascii(expected.sha256)[:80]}", found.sha256)
    return {
        "kind": "engine",
        "path": str(path),
        "bytes": found.size,
        "sha256": found.sha256,
        "target": record.target,
        "engine": record.to_json(),
        "segment": position,
        "traffic": describe_traffic(record, [file], kernels=True),
        "gpus": gpus_data(record),
        "layers": [layer.to_json() for layer in file.layers],
    }


def _another(beside: Path, expected: str, found: str) -> BundleError:
    return BundleError(
        f"{beside} is about {expected}",
        received=found,
        fix="inspect the file that was built with it, or export the bundle again",
    )
