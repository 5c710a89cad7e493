"""`open_bundle`: whatever changed in a bundle is found before anything in it is parsed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.bundle import open_bundle, write_manifest
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import BundleError
from mmdit_deploy.spec import PRECISIONS, ModelSpec

NAMES = ("engines/ort-cpu/model.ort", "model.onnx", "report.html", "weights.safetensors")


def _edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document))


def test_a_whole_bundle_opens(bundle: Path, fields: dict[str, Any]) -> None:
    opened = open_bundle(str(bundle))
    assert opened.path == bundle.resolve()
    assert opened.name == "mini"
    assert opened.spec == ModelSpec.from_json(fields["spec"])
    assert opened.precision is PRECISIONS["fp16"]
    assert opened.contract == Contract.of(opened.spec, PRECISIONS["fp16"])
    assert opened.file("engines/ort-cpu/model.ort").read_bytes() == b"engine"
    assert tuple(opened.manifest.files) == NAMES


def test_only_listed_files_are_given(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    for name in ("notes.txt", "manifest.json", "engines", "../mini/model.onnx", "engines/trt/model.engine"):
        with pytest.raises(BundleError) as caught:
            open_bundle(bundle).file(name)
        assert all(there in str(caught.value) for there in (*NAMES, name))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "report.html"])  # it is empty
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_is_found(bundle: Path, name: str, where: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    expected = open_bundle(bundle).manifest.files[name].sha256
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert str(bundle / name) in message and expected in message
    assert caught.value.received is not None and expected not in caught.value.received
    open_bundle(bundle, verify=False)  # which is what the check costs


def test_one_changed_byte_in_what_the_manifest_says_of_files_is_found(bundle: Path) -> None:
    path = bundle / "manifest.json"
    text = path.read_bytes()
    start = text.index(b'"files"')
    for at in range(start, len(text)):
        if chr(text[at]).isspace():
            continue
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        with pytest.raises(BundleError):
            open_bundle(bundle)
    path.write_bytes(text)
    open_bundle(bundle)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_resized_file_is_found(bundle: Path, name: str, verify: bool) -> None:
    size = (bundle / name).stat().st_size
    with (bundle / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=f"{name} must be {size} bytes") as caught:
        open_bundle(bundle, verify=verify)
    assert caught.value.received == f"{size + 1} bytes"
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} must be a file of {size} bytes") as caught:
        open_bundle(bundle, verify=verify)
    assert caught.value.received == "no such file"


@pytest.mark.parametrize("link", ["weights.safetensors", "engines/ort-cpu/model.ort", "engines/ort-cpu", "engines"])
def test_links_are_refused_though_their_content_is_right(bundle: Path, tmp_path: Path, link: str) -> None:
    shutil.move(bundle / link, tmp_path / "elsewhere")
    (bundle / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a regular file") as caught:
        open_bundle(bundle, verify=False)
    assert caught.value.received == f"{bundle / link} is a symbolic link"


def test_a_special_file_is_refused_and_not_read(bundle: Path) -> None:
    (bundle / "report.html").unlink()
    os.mkfifo(bundle / "report.html")
    with pytest.raises(BundleError, match="a special file"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["model.ort.onnx", "lora.SafeTensors", "a/b.onnx", "engines/x/y.txt"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_unlisted_files_that_a_runtime_would_load_are_refused(bundle: Path, name: str, kind: str) -> None:
    path = bundle / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"") if kind == "file" else path.symlink_to("nowhere")
    with pytest.raises(BundleError, match="must be listed") as caught:
        open_bundle(bundle)
    assert name in str(caught.value)


def test_other_unlisted_files_are_ignored(bundle: Path) -> None:
    for name in (".DS_Store", "model.onnx~", "notes/readme.md"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("mine")
    (bundle / "engines" / "empty").mkdir()
    open_bundle(bundle)


def test_a_path_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, said in (("nowhere", "does not exist"), ("file", "is a file"), ("", "no such file")):
        with pytest.raises(BundleError, match=said) as caught:
            open_bundle(tmp_path / name)
        assert caught.value.exit_status == 2


def test_a_link_to_a_bundle_is_followed_once(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle)
    opened = open_bundle(link)
    link.unlink()
    assert opened.file("model.onnx").read_bytes() == b"graph"


@pytest.mark.parametrize("field", ["name", "spec", "contract", "precision", "weights"])
@pytest.mark.parametrize("value", [None, 3, "", {}, [], [1], True])
def test_a_field_that_is_missing_or_wrong_is_named(bundle: Path, field: str, value: object) -> None:
    _edit(bundle, lambda document: document.update({field: value}))
    with pytest.raises(BundleError, match=r"manifest\.json must have"):
        open_bundle(bundle)
    _edit(bundle, lambda document: document.pop(field))
    with pytest.raises(BundleError, match=f"{field}: no such field"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("engines", value) for value in (None, 3, "", [], ["ort-cpu"], {"ort-cpu": "model.onnx"})),
        *(("engines", {"ort-cpu": engine}) for engine in ({}, {"graph": None}, {"graph": ["model.onnx"]})),
        *(("outputs", value) for value in (None, 3, "", {}, "blocks.0", [1], [None])),
        *(("weights", {"random": value, "origin": "here"}) for value in (None, 0, "no", True)),
        ("weights", {"random": False}),
        ("weights", {"random": False, "origin": 3}),
        *(("weights", {"random": True, "seed": seed, "origin": "here"}) for seed in (None, "0", 0.5, True)),
    ],
)
def test_what_later_stages_read_is_there_and_well_formed(bundle: Path, field: str, value: object) -> None:
    _edit(bundle, lambda document: document.update({field: value}))
    with pytest.raises(BundleError, match=f"{field}: "):
        open_bundle(bundle)
    _edit(bundle, lambda document: document.pop(field))
    with pytest.raises(BundleError, match=f"{field}: no such field"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "changes", [{"engines": {}}, {"outputs": []}, {"weights": {"origin": "checkpoint /x", "random": False}}]
)
def test_a_bundle_of_graphs_alone_opens(bundle: Path, changes: dict[str, Any]) -> None:
    _edit(bundle, lambda document: document.update(changes))
    open_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(precision="fp12"),
        lambda document: document.update(contract={"x": 1}),
        lambda document: document["spec"].update(depth=0),
        lambda document: document["spec"].update(depht=1),
        lambda document: document["spec"].update(mlp_ratio="4"),
        lambda document: document["contract"].pop("ranges"),
        lambda document: document["contract"].update(inputs=[1]),
        lambda document: document["contract"]["ranges"].update(batch=[1]),
    ],
)
def test_a_spec_or_contract_that_cannot_be_read(bundle: Path, change: Callable[[Any], object]) -> None:
    _edit(bundle, change)
    with pytest.raises(BundleError, match=r"manifest\.json must have"):
        open_bundle(bundle)


def test_a_file_that_cannot_be_read_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.open

    def failing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith("weights.safetensors"):
            raise PermissionError(13, "Permission denied")
        return read(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(BundleError, match=r"Permission denied: .*weights\.safetensors"):
        open_bundle(bundle)


def test_an_empty_bundle_has_nothing_to_hash(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_manifest(tmp_path, fields)
    assert open_bundle(tmp_path).manifest.files == {}
