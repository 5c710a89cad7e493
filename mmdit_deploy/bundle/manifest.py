"""`manifest.json`: what a bundle is, and the size and SHA-256 of every file in it.

The manifest is not signed. It finds corruption: a byte that changed, a file that is missing or cut short. It
does not find attackers, who can write a manifest as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_deploy.atomic import write_whole
from mmdit_deploy.bundle.files import FileRecord, hash_files, list_files
from mmdit_deploy.errors import BundleError, CheckpointError

MANIFEST = "manifest.json"
# A split model's engines take the modulation table: who knows format 1 only would take its trunk for the whole.
WHOLE, SPLIT = 1, 2
_MAX_BYTES = 16 * 10**6
_RESERVED = ("format", "files")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "copy the bundle again, or export it again"


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and is well-formed. Whether the files are as it says is another check.

    Attributes:
        fields: everything but the format and the files, e.g. ``name``, ``spec``, ``contract``.
        files: size and SHA-256 by path relative to the bundle, with forward slashes.
    """

    fields: Mapping[str, Any]
    files: Mapping[str, FileRecord]


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle, if perhaps a broken one.

    The name of the file alone does not tell: web applications have a ``manifest.json`` too. The words are
    looked for in the text, because a broken bundle is one that users want to replace.
    """
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        text = file.read(_MAX_BYTES)
    return all(f'"{word}"'.encode() in text for word in _RESERVED)


def write_manifest(
    directory: Path, fields: Mapping[str, Any], hashes: Mapping[str, tuple[int, str]] | None = None
) -> Manifest:
    """Writes the manifest of a directory, as the last of its files, so that it is there whole or not at all.

    Fields keep the order given, files are sorted: the same content gives the same bytes.

    Args:
        directory: holds all files of the bundle.
        fields: JSON values by name; ``format`` and ``files`` are added here.
        hashes: size and SHA-256 (lower-case hex) of files that were hashed while they were written, by path
            relative to the directory, with forward slashes. The other files are hashed here.

    Returns:
        The manifest as `read_manifest` reads it back.

    Raises:
        BundleError: the directory holds something that is no regular file or has no portable name, a file is
            not there or not of the size in `hashes`, or the manifest is beyond the size limit.
        OSError: a file cannot be read, or the manifest cannot be written.
        ValueError: a field has a reserved name, or is not JSON (NaN and infinity are not).
    """
    clash = sorted(set(fields) & set(_RESERVED))
    if clash:
        raise ValueError(f"the manifest's own fields are not given: {clash}")
    listing = list_files(directory)
    sizes = {name: size for name, size in listing.regular.items() if name != MANIFEST}
    for name in (*listing.other, *sizes):
        reason = listing.other.get(name) or _unportable(name)
        if reason:
            raise BundleError(
                "a bundle holds regular files with portable names only",
                received=f"{name!a} ({reason})",
                fix="write a regular file under another name",
            )
    known = {name: FileRecord(*record) for name, record in (hashes or {}).items()}
    for name, record in known.items():
        if sizes.get(name) != record.size:
            found = f"{sizes[name]} bytes" if name in sizes else "no such file"
            raise BundleError(
                "a file that was hashed while it was written is not changed afterwards",
                received=f"{name}: hashed {record.size} bytes, found {found}",
                fix="hash it when it is finished",
            )
    known |= hash_files(directory, [name for name in sizes if name not in known])
    files = {name: known[name]._asdict() for name in sorted(known)}
    document = {"format": _format_of(fields), **fields, "files": files}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(directory / MANIFEST, text)
    return read_manifest(directory)


def read_manifest(directory: Path) -> Manifest:
    """Reads a bundle's manifest, strictly. The files that it lists are not looked at.

    Args:
        directory: the bundle.

    Returns:
        The manifest.

    Raises:
        BundleError: there is none, or it is too large, not JSON, of an unknown format or one for other bundles, or
            lists something other than relative paths with a size and a SHA-256 each.
    """
    # imported here, because the package of the checkpoints imports torch, and writing needs none of it
    from mmdit_deploy.checkpoint.strict_json import parse_json_object

    path = directory / MANIFEST
    try:
        document = parse_json_object(_read_limited(path), str(path), _REMEDY)
    except CheckpointError as error:
        raise BundleError(error.rule, received=error.received, fix=error.fix) from error
    version = document.pop("format", None)
    if type(version) is not int or version not in (WHOLE, SPLIT):  # True and 1.0 equal 1, and we write neither
        raise BundleError(
            f"{path} must have format {WHOLE} or {SPLIT}, which this version reads",
            received=f"format {ascii(version)[:80]}",
            fix="use the version of mmdit-deploy that wrote the bundle, or export it again with this one",
        )
    if version != _format_of(document):
        raise BundleError(
            f"{path} has format {SPLIT} if the model is split, and else {WHOLE}",
            received=f"format {version} {'without' if version == SPLIT else 'with'} a split",
            fix=_REMEDY,
        )
    files = document.pop("files", None)
    if not isinstance(files, dict):
        raise _malformed(path, f"files is {'missing' if files is None else 'not an object'}")
    return Manifest(document, {name: _record(path, name, entry) for name, entry in files.items()})


def _format_of(fields: Mapping[str, Any]) -> int:
    return WHOLE if fields.get("split") is None else SPLIT


def _read_limited(path: Path) -> bytes:
    rule = "a bundle is a directory with a manifest.json"
    if path.is_symlink() or not path.is_file():
        found = "a link or a special file" if os.path.lexists(path) else "no such file"
        raise BundleError(rule, received=f"{path} ({found})", fix="name a directory that mmdit-export wrote")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BundleError(rule, received=f"{path} ({error.strerror})", fix="make it readable") from error
    if len(data) > _MAX_BYTES:
        raise BundleError(
            f"{path} has at most {_MAX_BYTES} bytes", received=f"{path.stat().st_size} bytes", fix=_REMEDY
        )
    return data


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    reason = "the manifest itself" if name == MANIFEST else _unportable(name)
    if reason:
        raise _malformed(path, f"the file {ascii(name)[:200]} ({reason})")
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        raise _malformed(path, f"{name} without just a size and a sha256")
    size, sha256 = entry["size"], entry["sha256"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise _malformed(path, f"{name} with the size {ascii(size)[:80]}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _malformed(path, f"{name} with the sha256 {ascii(sha256)[:80]}")
    return FileRecord(size, sha256)


def _malformed(path: Path, received: str) -> BundleError:
    return BundleError(
        f"{path} lists relative paths, each with a size in bytes and a SHA-256 in lower-case hex",
        received=received,
        fix=_REMEDY,
    )


def _unportable(name: str) -> str | None:
    """Why a name is no relative path with forward slashes that means the same on every machine."""
    if "\\" in name:
        return "a backslash"
    if not name.isprintable():  # control characters, and bytes that are not UTF-8
        return "an unprintable character"
    if name.startswith("/"):
        return "an absolute path"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "a path with an empty part, . or .."
    return None
