"""`manifest.json`: written last, the same for the same content, and read strictly."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.bundle import FileRecord, manifest, read_manifest, write_manifest
from mmdit_deploy.errors import BundleError

DIGEST = "0" * 64


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_it_lists_every_file_with_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "engines" / "ort-cpu").mkdir(parents=True)
    (tmp_path / "engines" / "ort-cpu" / "é.ort").write_bytes(b"engine")
    (tmp_path / "model.onnx").write_bytes(b"")
    written = write_manifest(tmp_path, {"name": "mini", "seed": 0, "shape": (1, 2)})
    document = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    assert list(document) == ["format", "name", "seed", "shape", "files"]
    assert document["format"] == 1
    assert document["files"] == {
        "engines/ort-cpu/é.ort": {"size": 6, "sha256": _digest(b"engine")},
        "model.onnx": {"size": 0, "sha256": _digest(b"")},
    }
    assert written == read_manifest(tmp_path)
    assert written.fields == {"name": "mini", "seed": 0, "shape": [1, 2]}
    assert written.files["model.onnx"] == FileRecord(0, _digest(b""))
    assert sorted(os.listdir(tmp_path)) == ["engines", "manifest.json", "model.onnx"]


def test_a_split_model_has_a_format_of_its_own(tmp_path: Path) -> None:
    """Who reads format 1 alone would take the trunk's engine for the whole one."""
    for split, number in (({"trunk": {}}, 2), (None, 1)):
        written = write_manifest(tmp_path, {"split": split})
        assert json.loads((tmp_path / "manifest.json").read_text())["format"] == number
        assert written.fields == {"split": split}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    names = ["b/2", "a", "b.onnx", "b/1", "c"]
    for directory, order in (("x", names), ("y", names[::-1])):
        for name in order:
            path = tmp_path / directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    write_manifest(tmp_path / "x", {"name": "mini"}, {"a": (1, _digest(b"a"))})
    write_manifest(tmp_path / "y", {"name": "mini"})
    write_manifest(tmp_path / "y", {"name": "mini"})  # a second run lists no manifest
    texts = [(tmp_path / d / "manifest.json").read_bytes() for d in ("x", "y")]
    assert texts[0] == texts[1]


def test_files_larger_than_a_chunk_are_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_deploy.bundle.files._CHUNK_BYTES", 7)
    data = bytes(range(100))
    (tmp_path / "weights.safetensors").write_bytes(data)
    assert write_manifest(tmp_path, {}).files["weights.safetensors"] == (100, _digest(data))


def test_given_digests_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"1234")
    record = write_manifest(tmp_path, {}, {"weights.safetensors": (4, DIGEST)}).files["weights.safetensors"]
    assert record == (4, DIGEST)


@pytest.mark.parametrize(("name", "found"), [("weights.safetensors", "5 bytes"), ("gone", "no such file")])
def test_a_given_digest_of_another_file_is_refused(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"12345")
    with pytest.raises(BundleError, match=f"{name}: hashed 4 bytes, found {found}"):
        write_manifest(tmp_path, {}, {name: (4, DIGEST)})
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("fields", [{"format": 2}, {"files": {}}, {"x": float("nan")}])
def test_fields_that_cannot_be_written(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"own fields|JSON compliant"):
        write_manifest(tmp_path, fields)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a\\b", "a\nb", os.fsdecode(b"\xff")])
def test_a_name_that_is_not_portable_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BundleError, match="portable"):
        write_manifest(tmp_path, {})


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc"), os.mkfifo])
def test_only_regular_files_are_listed(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "engines")
    with pytest.raises(BundleError, match="'engines'"):
        write_manifest(tmp_path, {})


def _document(**changes: Any) -> bytes:
    return json.dumps({"format": 1, "files": {}, **changes}).encode()


def _files(name: str = "a", **changes: Any) -> bytes:
    return _document(files={name: {"size": 1, "sha256": DIGEST, **changes}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "a JSON list"),
        (b"\xff", "not UTF-8"),
        (_document()[:-1], "not JSON"),
        (b'{"format": 1, "files": {}, "format": 1}', "repeated key 'format'"),
        (b'{"format": 1, "files": {"a": 1, "a": 1}}', "repeated key 'a'"),
        (_document(format=3), "format 3"),
        (_document(format=2), "format 2 without a split"),
        (_document(format=2, split=None), "format 2 without a split"),
        (_document(split={}), "format 1 with a split"),
        (_document(format=True), "format True"),
        (_document(format="1"), "format '1'"),
        (b'{"files": {}}', "format None"),
        (b'{"format": 1}', "files is missing"),
        (_document(files=[]), "files is not an object"),
        (_document(files={"a": 1}), "a without just a size"),
        (_files(more=1), "a without just a size"),
        (_files(size=-1), "the size -1"),
        (_files(size=True), "the size True"),
        (_files(size=1.0), r"the size 1\.0"),
        (_files(sha256=DIGEST[1:]), "the sha256"),
        (_files(sha256="A" * 64), "the sha256"),
        (_files(sha256=DIGEST + "\n"), "the sha256"),
        (_files("manifest.json"), "the manifest itself"),
        (_files("/etc/passwd"), "an absolute path"),
        (_files("../a"), r"an empty part, \. or \.\."),
        (_files("a/../b"), r"an empty part, \. or \.\."),
        (_files("./a"), r"an empty part, \. or \.\."),
        (_files("a//b"), "an empty part"),
        (_files(""), "an empty part"),
        (_files("a\\b"), "a backslash"),
        (_files("a\0b"), "an unprintable character"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=said) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value) and caught.value.fix


def test_a_manifest_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_MAX_BYTES", 1000)
    (tmp_path / "manifest.json").write_bytes(_document(text="x" * 1000))
    with pytest.raises(BundleError, match="at most 1000 bytes"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(_document(text="x" * 900))
    read_manifest(tmp_path)


def test_there_must_be_a_manifest_and_no_link(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        read_manifest(tmp_path)
    (tmp_path / "elsewhere").write_bytes(_document())
    (tmp_path / "manifest.json").symlink_to("elsewhere")
    with pytest.raises(BundleError, match="a link"):
        read_manifest(tmp_path)
