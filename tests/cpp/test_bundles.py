"""What is no whole bundle is refused, with an error that says the rule, what was received and the fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdit_deploy.build.records import EngineRecord, SegmentRecord
from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.contract import TensorSpec, profile_from_json
from mmdit_deploy.errors import BundleError

Document = dict[str, Any]


def refused(sanitized: Path, bundle: Path, *arguments: str, status: int = 2) -> str:
    """What the example says of a bundle that it refuses."""
    command = [sanitized / "mmdit-sample", bundle, bundle, "-o", bundle / "latent.npy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert (
        lines[0].startswith("mmdit-sample: ") and lines[1].startswith("  received: ") and lines[2].startswith("  fix:")
    )
    return done.stderr


def rewrite(bundle: Path, change: Callable[[Document], Any]) -> None:
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _set(*path: Any) -> Callable[[Document], None]:
    """Sets what lies at a path in a document to the last of the arguments; ``...`` removes it."""

    def change(document: Any) -> None:
        *way, last, value = path
        for step in way:
            document = document[step]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return change


SHA = "0" * 64
MANIFESTS = {
    "another format": (_set("format", 3), "must have format 1 or 2, the ones that this version reads"),
    "a format that equals 1": (_set("format", True), "must have format 1 or 2"),
    "a whole model in the format of a split one": (_set("format", 2), "format 2 without a split"),
    "a split model in the format of a whole one": (_set("split", {}), "format 1 with a split"),
    "no files": (_set("files", ...), "files is missing"),
    "a way out": (_set("files", "../x", {"size": 1, "sha256": SHA}), "a path with an empty part, . or .."),
    "an absolute path": (_set("files", "/etc/passwd", {"size": 1, "sha256": SHA}), "an absolute path"),
    "a backslash": (_set("files", "a\\b", {"size": 1, "sha256": SHA}), "a backslash"),
    "an unprintable name": (_set("files", "a\u202eb", {"size": 1, "sha256": SHA}), "an unprintable character"),
    "the manifest itself": (_set("files", "manifest.json", {"size": 1, "sha256": SHA}), "the manifest itself"),
    "a negative size": (_set("files", "model.onnx", "size", -1), "with the size -1"),
    "a size that is no number": (_set("files", "model.onnx", "size", "9"), "with the size '9'"),
    "no SHA-256": (_set("files", "model.onnx", "sha256", "abc"), "with the sha256 'abc'"),
    "a further field of a file": (_set("files", "model.onnx", "mode", 7), "without just a size and a sha256"),
    "a missing file": (_set("files", "more.onnx", {"size": 1, "sha256": SHA}), "no such file"),
    "no name": (_set("name", ""), "name is ''"),
    "no contract": (_set("contract", ...), "no contract"),
    "an unknown dtype": (_set("contract", "inputs", 0, "dtype", "float64"), "the dtype 'float64'"),
    "an axis without a range": (_set("contract", "inputs", 0, "axes", 1, "pixels"), "without a range"),
    "an axis without a name": (_set("contract", "ranges", "", [1, 2, 4]), "an axis without a name"),
    "a seed that is no number": (_set("weights", "seed", "0"), "weights"),
    "a range that falls": (_set("contract", "ranges", "batch", [4, 2, 1]), "falls"),
    "a range from nothing": (_set("contract", "ranges", "batch", [0, 2, 4]), "the size 0"),
    "a tensor beyond all memory": (
        lambda d: [_set("contract", "ranges", a, [1, 1, 10**9])(d) for a in ("batch", "img_tokens")],
        "bytes",
    ),
    "a tensor named twice": (lambda d: d["contract"]["inputs"].append(d["contract"]["inputs"][0]), "twice"),
    "an engine that is no object": (_set("engines", "ort-cpu", []), "no graph"),
    "an engine of another file": (_set("engines", "ort-cpu", "graph", "report.html"), "listed in the manifest"),
    "no engines": (_set("engines", {}), "--graph-only"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_broken_manifest_is_refused(sanitized: Path, bundle: Path, case: str) -> None:
    change, said = MANIFESTS[case]
    rewrite(bundle, change)
    assert said in refused(sanitized, bundle, "--verify", "never")


TEXTS = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "not UTF-8": b'{"name": "\xff"}',
    "a lone surrogate": b'{"name": "\\ud800"}',
    "a repeated key": b'{"format": 1, "format": 1}',
    "deep nesting": b"[" * 100_000,
    "a deep object": b'{"a":' * 100_000,
    "too many bytes": b'{"a": "' + b"x" * 16_000_000 + b'"}',
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_manifest_that_is_none_is_refused_here_and_by_python(sanitized: Path, bundle: Path, case: str) -> None:
    (bundle / "manifest.json").write_bytes(TEXTS[case])
    assert "manifest.json" in refused(sanitized, bundle)
    with pytest.raises(BundleError):
        open_bundle(bundle)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _to_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved").name)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "a bundle is a directory with a manifest.json"),
    "a linked manifest": (lambda b: _to_link(b / "manifest.json"), "a link or a special file"),
    "weights that were cut short": (lambda b: _cut(b / "weights.safetensors"), "bytes, as the manifest says"),
    "a bit of the weights": (lambda b: _flip(b / "weights.safetensors"), "with the SHA-256"),
    "a bit of the graph": (lambda b: _flip(b / "model.ort.onnx"), "with the SHA-256"),
    "a linked graph": (lambda b: _to_link(b / "model.ort.onnx"), "a symbolic link"),
    "a graph that is not listed": (lambda b: (b / "other.ONNX").write_bytes(b""), "not listed"),
    "an engine that is not listed": (
        lambda b: ((b / "engines").mkdir(exist_ok=True), (b / "engines/x").write_bytes(b"")),
        "not listed",
    ),
    "a special file": (lambda b: ((b / "model.onnx").unlink(), os.mkfifo(b / "model.onnx")), "a special file"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_other_than_the_manifest_says_are_refused(sanitized: Path, bundle: Path, case: str) -> None:
    change, said = FILES[case]
    change(bundle)
    assert said in refused(sanitized, bundle)
    with pytest.raises(BundleError):
        open_bundle(bundle)


def test_what_is_no_bundle_is_refused(sanitized: Path, tmp_path: Path) -> None:
    assert "No such file or directory" in refused(sanitized, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is a file" in refused(sanitized, tmp_path / "file")


def test_targets_that_do_not_run_here_are_refused(sanitized: Path, bundle: Path) -> None:
    assert "a target is one of" in refused(sanitized, bundle, "--target", "tpu")
    assert "has engines for 'ort-cpu'" in refused(sanitized, bundle, "--target", "ort-cuda", status=3)
    rewrite(bundle, lambda d: d["engines"].update({"ort-cuda": d["engines"]["ort-cpu"]}))
    assert "CUDAExecutionProvider" in refused(sanitized, bundle, "--target", "ort-cuda", status=3)


def test_a_seed_beyond_64_bits_is_one(sanitized: Path, bundle: Path) -> None:
    rewrite(bundle, _set("weights", "seed", 2**64 - 1))
    assert "noise.npy" in refused(sanitized, bundle)  # it was loaded: the inputs come next


def _tensorrt_engine(contract: Document) -> Document:
    """The record of an engine in two segments that reads and writes what a contract says."""
    inputs, outputs = ([TensorSpec.from_json(t) for t in contract[names]] for names in ("inputs", "outputs"))
    between = TensorSpec("between", outputs[0].axes, outputs[0].dtype)

    def segment(index: int, reads: list[TensorSpec], writes: list[TensorSpec]) -> SegmentRecord:
        return SegmentRecord(f"engines/{index}.engine", 9, (f"{index}",), tuple(reads), tuple(writes), {}, {}, {}, 1.0)

    return {
        "graph": "model.onnx",
        **EngineRecord(
            "rtx:sm89",
            "TensorRT-RTX",
            "1.7.1.116",
            ("8.9",),
            "strongly typed",
            "fused",
            tuple(profile_from_json(p) for p in contract["profiles"]),
            (segment(0, inputs, [between]), segment(1, [between, *inputs], outputs)),
        ).to_json(),
    }


def add_tensorrt(document: Document) -> None:
    """Adds an engine for TensorRT-RTX, of which there is the record alone, before the others."""
    split = document["split"]
    engine = _tensorrt_engine(document["contract"] if split is None else split["trunk"])
    if split is not None:
        engine["conditioning"] = _tensorrt_engine(split["conditioning"])
    document["engines"] = {"rtx:sm89": engine, **document["engines"]}


def test_a_build_without_tensorrt_says_so_and_auto_takes_another_engine(sanitized: Path, bundle: Path) -> None:
    rewrite(bundle, add_tensorrt)
    said = refused(sanitized, bundle, "--target", "rtx:sm89", status=3)
    assert "this build of the library has no TensorRT back end" in said
    assert "noise.npy" in refused(sanitized, bundle)  # ort-cpu was loaded: the inputs come next


RECORDS = {
    "no version": (_set("version", ...), "no version"),
    "another flavour": (_set("flavour", "TensorRT"), "an engine of 'TensorRT'"),
    "a capability that is no text": (_set("capabilities", [8.9]), "the capability 8.9"),
    "no profiles": (_set("profiles", []), "no profiles or no segments"),
    "no segments": (_set("segments", []), "no profiles or no segments"),
    "a profile of other axes": (_set("profiles", 0, {"steps": [1, 1, 1]}), "a profile without a range for 'batch'"),
    "a tensor of another shape": (_set("segments", 0, "inputs", 0, "axes", 0, 5), "which nothing before it writes so"),
    "a tensor that is written twice": (lambda e: e["segments"].append(e["segments"][0]), "again"),
    "no last segment": (lambda e: e["segments"].pop(), "no segment writes"),
}


@pytest.mark.parametrize("part", ["whole", "trunk", "conditioning"])
@pytest.mark.parametrize("case", RECORDS)
def test_a_broken_record_of_an_engine_is_refused(
    sanitized: Path, bundle_of: Callable[..., Path], tmp_path: Path, case: str, part: str
) -> None:
    change, said = RECORDS[case]
    bundle = Path(shutil.copytree(bundle_of(split=part != "whole"), tmp_path / "bundle"))
    rewrite(bundle, add_tensorrt)

    def change_part(document: Document) -> None:
        engine = document["engines"]["rtx:sm89"]
        change(engine["conditioning"] if part == "conditioning" else engine)

    rewrite(bundle, change_part)
    received = refused(sanitized, bundle, "--verify", "never").splitlines()[1]
    of = "'rtx:sm89' (conditioning): " if part == "conditioning" else "'rtx:sm89': "
    assert received.startswith(f"  received: {of}") and said in received


ARRAYS = {
    "no array": b"hello",
    "an unknown version": b"\x93NUMPY\x09\x00\x10\x00" + b" " * 16,
    "a header that never ends": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "float64": b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1, ), }            \n"
    + bytes(8),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_broken_arrays_are_refused(sanitized: Path, bundle: Path, case: str) -> None:
    (bundle / "noise.npy").write_bytes(ARRAYS[case])
    assert "is a NumPy file" in refused(sanitized, bundle, "--verify", "never")


def test_an_array_of_fewer_bytes_than_its_shape_is_refused(sanitized: Path, bundle: Path) -> None:
    np.save(bundle / "noise.npy", np.zeros((2, 20, 16), np.float32))
    _cut(bundle / "noise.npy")
    assert "shape [2, 20, 16] in 2559 bytes" in refused(sanitized, bundle, "--verify", "never")


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_mutated_manifests_and_headers_give_typed_errors(
    sanitized: Path, bundle_of: Callable[..., Path], tmp_path: Path, split: bool
) -> None:
    bundle = Path(shutil.copytree(bundle_of(split=split), tmp_path / "bundle"))
    _mutate(sanitized, bundle, tmp_path, count=150)


@pytest.mark.soak
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_ten_thousand_mutated_manifests_and_headers_give_typed_errors(
    sanitized: Path, bundle_of: Callable[..., Path], tmp_path: Path, split: bool
) -> None:
    bundle = Path(shutil.copytree(bundle_of(split=split), tmp_path / "bundle"))
    _mutate(sanitized, bundle, tmp_path, count=10_000)


def _mutate(sanitized: Path, bundle: Path, folder: Path, count: int) -> None:
    rewrite(bundle, add_tensorrt)
    np.save(folder / "array.npy", np.zeros((2, 3, 4), np.float32))
    command = [sanitized / "tests/mutate", bundle, folder / "array.npy", str(count), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes: dict[tuple[str, str], int] = {}
    for line in done.stdout.splitlines():
        kind, what, times = line.split()
        outcomes[kind, what] = int(times)
    for kind, error in (("manifest", "BundleError"), ("npy", "UsageError")):
        assert sum(times for (of, _), times in outcomes.items() if of == kind) == count
        assert outcomes[kind, error] > count // 2  # what was changed was looked at
        assert outcomes[kind, "well"] > 0
    assert outcomes["record", "BundleError"] > count // 50
