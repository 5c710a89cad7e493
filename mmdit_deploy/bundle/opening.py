"""`open_bundle`: a bundle is checked, file by file, before anything in it is deserialized.

An engine file is executable code, and a graph or a weights file goes to parsers that trust their input. So
nothing is parsed but the manifest, until every byte is the one that was written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_deploy.bundle.files import Listing, hash_files, list_files
from mmdit_deploy.bundle.manifest import MANIFEST, Manifest, read_manifest
from mmdit_deploy.contract import Contract, SplitContract
from mmdit_deploy.errors import BundleError, MMDiTError
from mmdit_deploy.spec import ModelSpec, Precision, precision

_REMEDY = "copy the bundle again, or export it again"
_LOADABLE = (".onnx", ".safetensors")  # what a runtime may pick up by itself
_ENGINES = "engines"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked.

    Attributes:
        path: its directory, absolute and without links, so that a link moved later cannot mix two bundles.
        manifest: what it says about itself.
        name: what the bundle calls the model.
        spec: the architecture.
        contract: names, dtypes and ranges of the engine's tensors.
        precision: the compute type, and how linear layers are quantized.
        split: the contracts of its parts, where its engines are in two: then the files of ``engines`` are those of the
            trunk, each with those of the conditioning. None where they are in one.
    """

    path: Path
    manifest: Manifest
    name: str
    spec: ModelSpec
    contract: Contract
    precision: Precision
    split: SplitContract | None = None

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Args:
            name: relative to the bundle, with forward slashes, e.g. ``engines/rtx-sm89/model.engine``.

        Raises:
            BundleError: the manifest lists no such file; says what is there.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"the files of {self.path} are {', '.join(sorted(self.manifest.files))}",
                received=name,
                fix="name one of them, or export the bundle again with the target that you need",
            )
        return self.path / name


def open_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Opens a bundle, after checking that it is whole and unchanged.

    Args:
        path: its directory.
        verify: read every file and compare its SHA-256 (seconds for gigabytes). Without it, only presence,
            kind and size of the files are checked.

    Returns:
        The bundle.

    Raises:
        BundleError: it does not exist, its manifest is broken, or a file is missing, changed, no regular
            file, or where a runtime would load it without its being listed. Names the file, what was
            expected, and what was found.
    """
    directory = Path(path)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise BundleError(
            "a bundle is a directory with a manifest.json",
            received=f"{directory} {found}",
            fix="name a directory that mmdit-export wrote",
        )
    directory = directory.resolve()
    manifest = read_manifest(directory)
    try:
        listing = list_files(directory)
        _check_presence(directory, manifest, listing)
        _check_unlisted(directory, manifest, listing)
        if verify:
            _check_content(directory, manifest)
    except OSError as error:
        raise BundleError(
            "every file of a bundle must be readable",
            received=str(error),
            fix="check its permissions and the disk",
        ) from error
    return _bundle(directory, manifest)


def _broken(path: Path, expected: str, found: str, fix: str = _REMEDY) -> BundleError:
    return BundleError(f"{path} must be {expected}, as the manifest says", received=found, fix=fix)


def _check_presence(directory: Path, manifest: Manifest, listing: Listing) -> None:
    for name, record in manifest.files.items():
        path = directory / name
        for part in (name, *(parent.as_posix() for parent in Path(name).parents)):
            if part in listing.other:  # the file itself, or a directory on the way to it
                what = f"{directory / part} is {listing.other[part]}"
                raise _broken(path, "a regular file", what, "copy the bundle with its files, not links to them")
        if name not in listing.regular:
            raise _broken(path, f"a file of {record.size} bytes", "no such file")
        if listing.regular[name] != record.size:
            raise _broken(path, f"{record.size} bytes", f"{listing.regular[name]} bytes")


def _check_unlisted(directory: Path, manifest: Manifest, listing: Listing) -> None:
    """Editors and viewers may leave their files; nothing may lie where a runtime would take it for ours."""
    stray = [
        name
        for name in sorted({*listing.regular, *listing.other} - {*manifest.files, MANIFEST})
        if name.lower().endswith(_LOADABLE) or name.split("/")[0].lower() == _ENGINES
    ]
    if stray:
        raise BundleError(
            f"every graph, weights and engine file in {directory} must be listed in its manifest",
            received=f"not listed: {', '.join(ascii(name) for name in stray)}",
            fix="remove them, or export the bundle again",
        )


def _check_content(directory: Path, manifest: Manifest) -> None:
    for name, found in hash_files(directory, manifest.files).items():
        expected = manifest.files[name]
        if found != expected:
            raise _broken(
                directory / name,
                f"{expected.size} bytes with the SHA-256 {expected.sha256}",
                f"{found.size} bytes with {found.sha256}",
            )


def _bundle(directory: Path, manifest: Manifest) -> Bundle:
    def field(name: str, kind: type, *, may_be_empty: bool = False) -> Any:
        value = manifest.fields.get(name)
        if not isinstance(value, kind) or not (value or may_be_empty):
            shown = "no such field" if name not in manifest.fields else ascii(value)[:80]
            raise _malformed(directory, f"{name}: {shown}")
        return value

    name, compute = field("name", str), field("precision", str)
    spec, contract, weights = field("spec", dict), field("contract", dict), field("weights", dict)
    engines, outputs = field("engines", dict, may_be_empty=True), field("outputs", list, may_be_empty=True)
    split = manifest.fields.get("split")  # none in bundles of earlier versions
    for part, well_formed in (
        ("split", split is None or isinstance(split, dict)),
        ("engines", split is None or all(_has_conditioning(entry) for entry in engines.values())),
        ("weights", _are_weights(weights)),
        ("engines", all(isinstance(e, dict) and isinstance(e.get("graph"), str) for e in engines.values())),
        ("outputs", all(isinstance(output, str) for output in outputs)),
    ):
        if not well_formed:
            raise _malformed(directory, f"{part}: {ascii(manifest.fields[part])[:80]}")
    try:
        whole = Contract.from_json(contract)
        return Bundle(
            directory,
            manifest,
            name,
            ModelSpec.from_json(spec),
            whole,
            precision(compute, manifest.fields.get("base")),
            None if split is None else SplitContract.from_json(split, whole),
        )
    except MMDiTError as error:
        raise _malformed(directory, str(error)) from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # other values than we write
        raise _malformed(directory, f"{type(error).__name__}: {error}") from error


def _has_conditioning(entry: Any) -> bool:
    """Whether an engine's entry has that of its conditioning."""
    own = entry.get("conditioning") if isinstance(entry, dict) else None
    return isinstance(own, dict) and isinstance(own.get("graph"), str)


def _are_weights(value: dict[str, Any]) -> bool:
    """Whether this says where weights come from, and the seed of random ones."""
    origin, random, seed = value.get("origin"), value.get("random"), value.get("seed")
    return isinstance(origin, str) and isinstance(random, bool) and (not random or type(seed) is int)


def _malformed(directory: Path, received: str) -> BundleError:
    return BundleError(
        f"{directory / MANIFEST} must have a name, a spec, a contract, a precision, weights, engines and outputs",
        received=received,
        fix=_REMEDY,
    )
