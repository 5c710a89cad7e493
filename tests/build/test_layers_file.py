"""`layers.json` is read back as it was written, and refused, in our words, where it is anything else."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.build import EngineRecord, SegmentRecord
from mmdit_deploy.build.floor import Floor
from mmdit_deploy.build.layers import EngineLayer, LayerTensor
from mmdit_deploy.build.layers_file import FILE_NAME, read_layers, read_record, write_layers
from mmdit_deploy.contract import Range, TensorSpec
from mmdit_deploy.errors import BundleError

FOLDER = "engines/rtx-sm86+sm89"
PROFILE = {"batch": Range(1, 2, 4), "img_tokens": Range(256, 4096, 16384)}


def layer(name: str, kind: str, call: str) -> EngineLayer:
    read, weight = LayerTensor("in", (-1, 64), "Half", 640), LayerTensor("weight", (64, 1), "Half", 64)
    made, sources = LayerTensor("out", (), "Float"), (("node_MatMul_1", call),)
    return EngineLayer(name, kind, 0, sources, (read,), (made,), "t", (weight,), 1280)


def segment(number: int, *calls: str) -> SegmentRecord:
    return SegmentRecord(
        f"{FOLDER}/segment-{number}.engine",
        nbytes=1000 + number,
        calls=calls,
        inputs=(TensorSpec("hidden_states", ("batch", "img_tokens", 64), "float16"),),
        outputs=(TensorSpec("sample", ("batch", "img_tokens", 64), "float16"),),
        kernels_by_type={"gemm": len(calls), "kgen": 1},
        kernels_by_call={**dict.fromkeys(calls, 1), "engine": 1},
        fused_attentions={call: 1 for call in calls if call.startswith("blocks.")},
        seconds=1.25,
        floors=({call: Floor(1000, 10**12) for call in calls if call.startswith("blocks.")},),
    )


SEGMENTS = (segment(0, "conditioning", "blocks.0"), segment(1, "blocks.1", "final"))
RECORD = EngineRecord(
    "rtx:sm86+sm89", "TensorRT-RTX", "1.7.1.116", ("8.6", "8.9"), "TensorRT-RTX, fp16 kernels", "fused", (PROFILE,),
    SEGMENTS,
)  # fmt: skip
LAYERS = {
    SEGMENTS[0].file: (layer("_gemm_mha_v2_myl0_4", "kgen", "blocks.0"), layer("signal\n\x1f„é", "signal", "")),
    SEGMENTS[1].file: (layer("node_MatMul_1", "gemm", "final"),),
}
HASHES = {s.file: (s.nbytes, f"{i}" * 64) for i, s in enumerate(SEGMENTS)} | {"weights.safetensors": (5, "f" * 64)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_layers(tmp_path, RECORD, LAYERS, HASHES)
    return tmp_path / FILE_NAME


def test_it_is_read_as_it_was_written(path: Path) -> None:
    record, files = read_layers(path)
    assert record == dataclasses.replace(RECORD, segments=tuple(dataclasses.replace(s, seconds=1.2) for s in SEGMENTS))
    assert [file.name for file in files] == ["segment-0.engine", "segment-1.engine"]
    assert [file.sha256 for file in files] == ["0" * 64, "1" * 64]
    assert [file.layers for file in files] == list(LAYERS.values())
    assert [file.segment for file in files] == list(record.segments)


def test_each_layer_has_a_line(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert sum('"tactic"' in line for line in text.splitlines()) == 3
    assert text.count('"tactic"') == 3 and json.loads(text)["format"] == 2


def test_the_same_build_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    write_layers(tmp_path, RECORD, LAYERS, HASHES)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [FILE_NAME]


def test_a_file_that_changed_after_it_was_recorded_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000"):
        write_layers(tmp_path, RECORD, LAYERS, {**HASHES, SEGMENTS[0].file: (7, "0" * 64)})
    with pytest.raises(KeyError):
        write_layers(tmp_path, RECORD, {SEGMENTS[0].file: ()}, HASHES)
    assert os.listdir(tmp_path) == []


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_layers(path)
    error = caught.value
    assert str(path) in error.rule and error.received and error.fix and error.exit_status == 2
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"[]", "a JSON list"),
        (b'{"format": 1, "format": 1}', "repeated"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "nested"),
        (b'{"format": 3}', "format 3"),
        (b'{"format": true}', "format True"),
        (b'{"format": 1, "target": "rtx:sm89"}', "no engine, files"),
        (b'{"format": 2, "target": "rtx:sm89"}', "no engine, files"),
        (b" " * (32 * 2**20 + 1), "at most"),
    ],
)
def test_what_is_no_layers_file(content: bytes, word: str, path: Path) -> None:
    path.write_bytes(content)
    refused(path, word)


def test_what_is_no_file(path: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none.json", "no such file")
    (tmp_path / "link.json").symlink_to(path)
    refused(tmp_path / "link.json", "no regular file")
    refused(tmp_path, "no regular file")


def places(value: Any, *steps: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, as the steps that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in items:
        yield (*steps, step)
        yield from places(item, *steps, step)


def changed(document: Any, steps: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    holder = functools.reduce(lambda at, step: at[step], steps[:-1], document)
    holder[steps[-1]] = value
    return document


ODD = (None, True, -(2**70), 2**70, 1.5, math.nan, "\x1b", [], [0], [[]], {}, {"a": None}, {"a": 10**400})


def test_any_other_value_anywhere_is_read_or_refused(path: Path) -> None:
    document = json.loads(path.read_text())
    outcomes = Counter[bool]()
    for steps, odd in itertools.product(places(document), ODD):
        path.write_text(json.dumps(changed(document, steps, odd)))
        try:
            read_layers(path)
        except BundleError as error:
            assert error.received and error.fix and "\x1b" not in str(error) and len(str(error)) < 1000
            outcomes[True] += 1
        else:
            outcomes[False] += 1
    # What is read: other words where there are words, and nothing where there may be nothing.
    assert outcomes[True] > 1000 and outcomes[False] < outcomes[True] / 5


@pytest.mark.parametrize(
    ("where", "value", "word"),
    [
        ("target", 5, "target: 5"),
        ("engine.version", {"a": 1}, "version: {'a': 1}"),
        ("engine.capabilities", "8.9", "capabilities: '8.9'"),
        ("engine.profiles.0.batch", [1, 2], "batch'"),
        ("engine.profiles.0.batch", [2, 1, 4], "profiles"),
        ("engine.profiles", [], "no profile"),
        ("engine.segments", [], "bytes 2001"),
        ("engine.bytes", 1, "adds up"),
        ("engine.kernels.total", 1, "adds up"),
        ("engine.kernels.by_call", {"blocks.0": 500}, "adds up"),
        ("engine.fused_attentions", {}, "adds up"),
        ("engine.segments.0.seconds", math.nan, "seconds: nan"),
        ("engine.segments.0.bytes", True, "bytes: True"),
        ("engine.segments.0.bytes", -1, "bytes: -1"),
        ("engine.segments.0.calls", [], "without calls"),
        ("engine.segments.0.kernels.by_type.gemm", 2.0, "'gemm': 2.0"),
        ("engine.segments.0.kernels.by_type.gemm", 7, "adds up"),
        ("engine.segments.0.kernels.total", 7, "adds up"),
        ("engine.segments.0.inputs.0.axes", "ab", "axes: 'ab'"),
        ("engine.segments.1.file", "engines/rtx-sm86+sm89/segment-0.engine", "segments"),
        ("files.segment-0.engine", None, "segment-0.engine'"),
        ("files.segment-0.engine.bytes", 1, "segments"),
        ("files.segment-0.engine.layers.1.type", 5, "layers[1].type: 5"),
        ("files.segment-0.engine.layers.0.sources.0", ["node"], "sources[0]"),
        ("files.segment-0.engine.layers.0.inputs.0.1", [0.5], "inputs[0][1][0]: 0.5"),
        ("files.segment-0.engine.layers.0.inputs.0", ["x", [1], "Half"], "inputs[0]"),
        ("files.segment-0.engine.layers.0.inputs.0.3", -1, "inputs[0][3]: -1"),
        ("files.segment-0.engine.layers.0.constants.0.3", "1", "constants[0][3]: '1'"),
        ("files.segment-0.engine.layers.0.flops", 0.5, "flops: 0.5"),
        ("engine.segments.0.floors.0", {"blocks.0": {"bytes": 1}}, "floors[0].'blocks.0': no flops"),
        ("engine.segments.0.fp8_attentions", {"blocks.0": 1}, "fp8_attentions {}"),
        ("engine.quantized_products", {"fp8": 1}, "quantized_products {'fp8': 1}"),
        ("engine.segments.0.quantized_products", {"blocks.0": 1}, "quantized_products.'blocks.0': 1"),
        ("engine.segments.0.floors", [{}, {}], "floors of another number than the 1 profiles"),
        ("files.segment-0.engine.layers.0.profile", -1, "profile: -1"),
        ("files.segment-0.engine.layers.0.profile", 1, "beyond the 1"),
    ],
)
def test_what_is_wrong_is_named(where: str, value: Any, word: str, path: Path) -> None:
    document = json.loads(path.read_text())
    text = where.replace("segment-0.engine", "FILE")
    steps = tuple(int(s) if s.isdecimal() else s.replace("FILE", "segment-0.engine") for s in text.split("."))
    path.write_text(json.dumps(changed(document, steps, value)))
    refused(path, word)


def test_a_missing_field_is_named(path: Path) -> None:
    document, sizes = json.loads(path.read_text()), {"constants", "flops"}
    later = {"activation_bytes", "fp8_attentions", "quantized_products"}
    fields = [
        (("engine",), {*document["engine"]} - later),
        (("engine", "segments", 1), {*document["engine"]["segments"][1]} - later - {"floors"}),
        (("engine", "segments", 1, "outputs", 0), {"name", "axes", "dtype"}),
        (("files", "segment-1.engine"), {"bytes", "sha256", "layers"}),
        (("files", "segment-1.engine", "layers", 0), {*document["files"]["segment-1.engine"]["layers"][0]} - sizes),
    ]
    for steps, names in fields:
        for name in names:
            of = functools.reduce(lambda at, step: at[step], steps, document)
            path.write_text(json.dumps(changed(document, steps, {k: v for k, v in of.items() if k != name})))
            refused(path, f"no {name}")


def test_what_is_quantized_may_be_missing(path: Path) -> None:
    """Versions that quantized nothing did not write it."""
    document = json.loads(path.read_text())
    for place in (document["engine"], *document["engine"]["segments"]):
        del place["fp8_attentions"], place["quantized_products"]
    path.write_text(json.dumps(document))
    record = read_layers(path)[0]
    assert not record.fp8_attentions and not record.quantized_by_scheme


def test_activation_memory_may_be_missing(path: Path) -> None:
    """TensorRT does not always say it, and earlier versions did not keep it."""
    document = json.loads(path.read_text())
    del document["engine"]["activation_bytes"], document["engine"]["segments"][0]["activation_bytes"]
    path.write_text(json.dumps(document))
    assert read_layers(path)[0].activation_bytes is None
    document["engine"]["segments"][0]["activation_bytes"] = -1
    path.write_text(json.dumps(document))
    refused(path, "activation_bytes: -1")


def test_what_an_earlier_version_wrote_is_read(path: Path) -> None:
    """Format 1 had no sizes, no constants, and no floors: of these nothing is known."""
    document = json.loads(path.read_text())
    document["format"] = 1
    for segment in document["engine"]["segments"]:
        del segment["floors"]
    for file in document["files"].values():
        for entry in file["layers"]:
            del entry["constants"], entry["flops"]
            for tensor in (*entry["inputs"], *entry["outputs"]):
                del tensor[3:]
    path.write_text(json.dumps(document))
    record, files = read_layers(path)
    assert [s.floors for s in record.segments] == [(), ()]
    for entry in files[0].layers:
        assert entry.constants is None and entry.flops is None
        assert entry.inputs == (LayerTensor("in", (-1, 64), "Half"),)
    document["files"]["segment-0.engine"]["layers"][0]["inputs"][0].append(640)  # as format 2 has it
    path.write_text(json.dumps(document))
    refused(path, "inputs[0]")


def test_an_entry_of_a_manifest_may_say_more(path: Path) -> None:
    entry = json.loads(path.read_text())["engine"]
    assert read_record(RECORD.target, {**entry, "note": [1]}, "manifest.json").capabilities == ("8.6", "8.9")
    with pytest.raises(BundleError, match=r"manifest\.json, engine 'rtx:sm86\+sm89'"):
        read_record(RECORD.target, {**entry, "flavour": None}, "manifest.json")
