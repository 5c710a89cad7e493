"""`mmdit-inspect` of TensorRT engines: what was built, read from records, on a machine without TensorRT or a GPU."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdit_deploy.build import EngineRecord, SegmentRecord, parse_target
from mmdit_deploy.build.floor import Floor
from mmdit_deploy.build.layers import EngineLayer, LayerTensor, kernels_by_call, kernels_by_type
from mmdit_deploy.build.layers_file import FILE_NAME, write_layers
from mmdit_deploy.bundle import write_manifest
from mmdit_deploy.cli.runs import Run, runs
from mmdit_deploy.contract import Contract, Profile, Range, TensorSpec
from mmdit_deploy.model import calls
from mmdit_deploy.spec import from_depth, precision

SPEC = from_depth(6)
TARGET = parse_target("rtx:sm86+sm89")
FIRST, SECOND = (f"{TARGET.folder}/segment-{i}.engine" for i in range(2))
CONTENT = {FIRST: b"first engine" * 100, SECOND: b"second engine" * 200}
PROFILE = {"batch": Range(1, 2, 4), "img_tokens": Range(256, 4096, 16384), "txt_tokens": Range(2, 333, 512)}
ONE = {"batch": Range(1, 1, 1), "img_tokens": Range(1024, 1024, 1024), "txt_tokens": Range(77, 77, 333)}
EMBEDDERS = [call.path for call in calls(SPEC) if call.path.endswith(("conditioning", "embed"))]
MODULATIONS = [call.path for call in calls(SPEC) if call.path.startswith("modulations")]
PARTS = {
    FIRST: (*EMBEDDERS, *MODULATIONS, *(f"blocks.{i}" for i in range(4))),
    SECOND: ("blocks.4", "blocks.5", "final_modulation", "final"),
}
EVIL = "evil\x1b[2J\r\n\u202e"


def kernels_of(call: str) -> Iterator[tuple[str, str]]:
    """Names and types of what a call became."""
    if call.startswith("blocks."):
        last = call == "blocks.5"
        yield "_gemm_mha_v2_myl0_7", "kgen"
        yield from ((f"__myl_FcAdd_myl0_{i}", "runtime_fusion") for i in range(3 if last else 4))
        yield from (("__mye11+__mye12", "gemm") for _ in range(1 if last else 2))
    elif call == MODULATIONS[-1] or not call.startswith("modulations"):  # one GEMM for all of them
        yield f"node_of_{call}", "gemm"


def layers_of(file: str, profiles: int) -> list[EngineLayer]:
    """In the plan of profile N, a kernel reads (N + 1) MB and a weight of 1 MB, writes 3 MB, and does 4 GFLOP."""
    made = [EngineLayer(f"{file}: wait", "wait", 0, (), (), (), "")]
    for profile, call in itertools.product(range(profiles), PARTS[file]):
        read, written = (LayerTensor("x", (-1, 64), "Half", n * 500_000) for n in (profile + 1, 3))
        weight = LayerTensor("w", (1000, 500), "Half", 500_000)
        made += (
            EngineLayer(name, kind, profile, (("node", call),), (read,), (written,), "tactic", (weight,), 4 * 10**9)
            for name, kind in kernels_of(call)
        )
    return made


def record_of(*profiles: Profile) -> EngineRecord:
    segments = []
    for file, nbytes in ((file, len(content)) for file, content in CONTENT.items()):
        layers = layers_of(file, len(profiles))
        segments.append(
            SegmentRecord(
                file,
                nbytes,
                PARTS[file],
                (TensorSpec("hidden_states", ("batch", "img_tokens", 64), "float16"),),
                (TensorSpec("sample", ("batch", "img_tokens", 64), "float16"),),
                kernels_by_type(layers),
                kernels_by_call(layers, PARTS[file]),
                {call: 1 for call in PARTS[file] if call.startswith("blocks.")},
                seconds=12.34,
                floors=tuple(
                    {call: Floor(7 * 10**6, 10**9) for call in PARTS[file] if call.startswith("blocks.")}
                    for _ in profiles
                ),
            )
        )
    execution = "TensorRT-RTX, fp16 kernels, fused attention"
    return EngineRecord(
        TARGET.name, "TensorRT-RTX", "1.7.1.116", ("8.6", "8.9"), execution, "fused", profiles, tuple(segments)
    )


def write_bundle(folder: Path, *profiles: Profile) -> Path:
    """A bundle with an engine for ONNX Runtime, and one in two files for TensorRT-RTX."""
    record = record_of(*profiles)
    (folder / TARGET.folder).mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    (folder / TARGET.folder / "build.log").write_text("[VERBOSE] …\n")
    hashes = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()}
    write_layers(folder / TARGET.folder, record, {f: layers_of(f, len(profiles)) for f in CONTENT}, hashes)
    write_manifest(
        folder,
        {
            "name": SPEC.name,
            "precision": "fp16",
            "spec": SPEC.to_json(),
            "contract": Contract.of(SPEC, precision("fp16"), PROFILE, profiles=profiles).to_json(),
            "weights": {"origin": "random (seed 0)", "random": True, "seed": 0},
            "outputs": [],
            "engines": {
                "ort-cpu": {"graph": "model.ort.onnx", "execution": "ONNX Runtime on CPU, fp16 through casts"},
                TARGET.name: {"graph": "model.onnx", "dialect": "standard", **record.to_json()},
            },
            "versions": {"torch": "2.13.0", "tensorrt-rtx-cu13": "1.7.1.116"},
        },
    )
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", PROFILE)


def words(text: str) -> list[str]:
    """Lines with single spaces, to compare without the columns."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_an_engine(bundle: Path, run: Callable[..., Any]) -> None:
    path = bundle / FIRST
    text = words(run("inspect", path).out)
    assert text[0] == f"engine {path}: 1.20 kB, the file that was built; read from its layers.json, not deserialized"
    for line in (
        "target rtx:sm86+sm89",
        "for TensorRT-RTX 1.7.1.116 and no other, compute capability 8.6, 8.9",
        "execution TensorRT-RTX, fp16 kernels, fused attention",
        "segment 1 of 2",
        "calls conditioning … blocks.3 (19)",
        "in 12.3 s",
        "input hidden_states [batch, img_tokens, 64] float16",
        "output sample [batch, img_tokens, 64] float16",
        "profile axis min opt max",
        "0 img_tokens 256 4096 16384",
    ):
        assert line in text
    start = text.index("kernels by type")
    assert text[start + 1 : start + 6] == ["type kernels", "runtime_fusion 16", "gemm 12", "kgen 4", "all 32"]
    start = next(i for i, line in enumerate(text) if line.startswith("kernels by call"))
    assert text[start + 1 : text.index("", start)] == [
        "call calls kernels fused attentions",
        "conditioning 1 1 0",
        "img_embed 1 1 0",
        "txt_embed 1 1 0",
        "modulations.0.img … modulations.5.img 6 0 0",
        "modulations.0.txt … modulations.4.txt 5 0 0",
        "modulations.5.txt 1 1 0",
        "blocks.0 … blocks.3 4 7 1",
    ]
    start = text.index("most frequent kernels")
    assert text[start + 1 : start + 4] == ["__myl_FcAdd 16", "gemm, by another name 12", "_gemm_mha_v2 4"]
    assert text[-1] == "layers: 33, of which 32 are kernels (--json lists all)"


def test_an_engine_as_json(bundle: Path, run: Callable[..., Any]) -> None:
    data = run("inspect", bundle / SECOND, "--json").json
    assert set(data) == {
        "kind", "path", "bytes", "sha256", "target", "engine", "segment", "traffic", "gpus", "layers"
    }  # fmt: skip
    assert (data["kind"], data["target"], data["bytes"]) == ("engine", "rtx:sm86+sm89", 2600)
    assert data["sha256"] == hashlib.sha256(CONTENT[SECOND]).hexdigest()
    assert data["engine"]["segments"][data["segment"]]["file"] == SECOND
    layers = [EngineLayer.from_json(layer) for layer in data["layers"]]
    assert layers == layers_of(SECOND, 1)
    assert sum(layer.is_fused_attention for layer in layers) == 2
    assert data["engine"] == record_of(PROFILE).to_json()


HEADER = "call calls read weights written all floor × floor GFLOP A10 ms RTX 3090 ms L4 ms L40S ms RTX 4090 ms"


def test_bytes_of_calls_and_kernels(bundle: Path, run: Callable[..., Any]) -> None:
    text = words(run("inspect", bundle / FIRST).out)
    start = text.index("bytes at the opt shape (batch 2, img_tokens 4096, txt_tokens 333), of each call")
    end = text.index("", start)
    assert text[start + 1 : end - 3] == [
        HEADER,
        "conditioning 1 1.00 MB 1.00 MB 3.00 MB 5.00 MB 4.00 0.032 0.056 0.033 0.011 0.024",
        "img_embed 1 1.00 MB 1.00 MB 3.00 MB 5.00 MB 4.00 0.032 0.056 0.033 0.011 0.024",
        "txt_embed 1 1.00 MB 1.00 MB 3.00 MB 5.00 MB 4.00 0.032 0.056 0.033 0.011 0.024",
        "modulations.5.txt 1 1.00 MB 1.00 MB 3.00 MB 5.00 MB 4.00 0.032 0.056 0.033 0.011 0.024",
        "blocks.0 … blocks.3 4 7.00 MB 7.00 MB 21.00 MB 35.00 MB 7.00 MB 5.00 28.00 0.224 0.394 0.231 0.077 0.169",
        "all 32.00 MB 32.00 MB 96.00 MB 160.00 MB 128.00 1.024 1.803 1.058 0.354 0.775",
    ]
    assert text[end - 1].startswith("ms: estimate, not measured: a roofline")
    assert text[end + 1 : end + 3] == [
        "kernels of blocks.0, by bytes",
        "kernel type read weights written all GFLOP A10 ms RTX 3090 ms L4 ms L40S ms RTX 4090 ms",
    ]
    assert (
        text[end + 3] == "_gemm_mha_v2_myl0_7 kgen 1.00 MB 1.00 MB 3.00 MB 5.00 MB 4.00 0.032 0.056 0.033 0.011 0.024"
    )
    assert len(text[end + 3 : text.index("", end + 1)]) == 7


def test_bytes_of_a_bundle_are_those_of_its_engines(bundle: Path, run: Callable[..., Any]) -> None:
    result = run("inspect", bundle, "--json")
    text = words(result.err)
    assert HEADER in text and not any(line.startswith("kernels of") for line in text)
    rows = text[text.index(HEADER) :]
    assert rows[6].startswith("blocks.5 1 5.00 MB 5.00 MB 15.00 MB 25.00 MB 7.00 MB 3.57 20.00")
    assert rows[9].startswith("all 46.00 MB 46.00 MB 138.00 MB 230.00 MB 184.00 ")
    (profile,) = result.json["traffic"][TARGET.name]
    assert set(profile) == {"opt", "calls", "all"}
    assert [gpu["name"] for gpu in result.json["gpus"][TARGET.name]] == ["A10", "RTX 3090", "L4", "L40S", "RTX 4090"]


def test_bytes_as_json(bundle: Path, run: Callable[..., Any]) -> None:
    data = run("inspect", bundle / FIRST, "--json").json
    (profile,) = data["traffic"]
    assert profile["opt"] == {"batch": 2, "img_tokens": 4096, "txt_tokens": 333}
    block = profile["calls"]["blocks.2"]
    seconds = block.pop("seconds")
    assert block == {
        "read": 7 * 10**6, "weights": 7 * 10**6, "written": 21 * 10**6, "bytes": 35 * 10**6, "flops": 28 * 10**9,
        "unknown": 0, "floor": {"bytes": 7 * 10**6, "flops": 10**9},
    }  # fmt: skip
    assert seconds["RTX 4090"] == pytest.approx(7 * max(5e6 / 1008e9, 4e9 / 165.2e12))
    assert profile["calls"]["conditioning"]["floor"] is None
    assert len(profile["kernels"]) == 32
    kernel = next(kernel for kernel in profile["kernels"] if kernel["call"] == "blocks.3")
    assert (kernel["name"], kernel["type"], kernel["bytes"]) == ("_gemm_mha_v2_myl0_7", "kgen", 5 * 10**6)
    (source,) = {gpu["source"] for gpu in data["gpus"] if gpu["name"] == "RTX 4090"}
    assert "NVIDIA Ada" in source


def test_bytes_of_several_profiles(tmp_path: Path, run: Callable[..., Any]) -> None:
    bundle = write_bundle(tmp_path / "bundle", ONE, PROFILE)
    text = words(run("inspect", bundle / FIRST).out)
    first = text.index("bytes at the opt shape of profile 0 (batch 1, img_tokens 1024, txt_tokens 77), of each call")
    second = text.index("bytes at the opt shape of profile 1 (batch 2, img_tokens 4096, txt_tokens 333), of each call")
    assert "kernels of blocks.0 of profile 0, by bytes" in text and "kernels of blocks.0 of profile 1, by bytes" in text
    assert text[first + 2].startswith("conditioning 1 1.00 MB 1.00 MB 3.00 MB 5.00 MB")
    assert text[second + 2].startswith("conditioning 1 2.00 MB 1.00 MB 3.00 MB 6.00 MB")


def test_what_is_not_known_is_said_to_be_missing(bundle: Path, run: Callable[..., Any]) -> None:
    def forget(data: Any) -> None:
        kernel = next(k for k in data["files"]["segment-0.engine"]["layers"] if k["sources"] == [["node", "blocks.1"]])
        kernel["inputs"][0][3] = None

    edit(bundle / TARGET.folder / FILE_NAME, forget)
    text = words(run("inspect", bundle / FIRST).out)
    assert any(line.startswith("blocks.0 1 7.00 MB 7.00 MB 21.00 MB 35.00 MB 7.00 MB 5.00 ") for line in text)
    (line,) = (line for line in text if line.startswith("blocks.1 1 "))
    assert line.startswith("blocks.1 1 6.00 MB 7.00 MB 21.00 MB ≥ 34.00 MB 7.00 MB ≥ 4.86 28.00 ≥ 0.224 ")
    assert "kernels of blocks.0, by bytes" in text  # like blocks.2 and blocks.3
    data = run("inspect", bundle / FIRST, "--json").json
    assert [data["traffic"][0]["calls"][f"blocks.{i}"]["unknown"] for i in range(3)] == [0, 1, 0]


def test_an_engine_of_an_earlier_version_has_no_bytes(bundle: Path, run: Callable[..., Any]) -> None:
    """Its layers had no sizes, and its record no floors: that is said, and the rest is shown as ever."""

    def earlier(data: Any) -> None:
        data["format"] = 1
        for segment in data["engine"]["segments"]:
            del segment["floors"]
        for layer in (layer for file in data["files"].values() for layer in file["layers"]):
            del layer["constants"], layer["flops"]
            for tensor in (*layer["inputs"], *layer["outputs"]):
                del tensor[3:]

    edit(bundle / TARGET.folder / FILE_NAME, earlier)
    text = words(run("inspect", bundle / FIRST).out)
    assert "bytes: not recorded by the version that built it; export it again to have them" in text
    assert "blocks.0 … blocks.3 4 7 1" in text and HEADER not in text
    assert run("inspect", bundle / FIRST, "--json").json["traffic"] == []


def test_a_manifest_of_an_earlier_version(bundle: Path, run: Callable[..., Any]) -> None:
    def earlier(manifest: Any) -> None:
        del manifest["files"][f"{TARGET.folder}/{FILE_NAME}"]
        for segment in manifest["engines"][TARGET.name]["segments"]:
            del segment["floors"]

    (bundle / TARGET.folder / FILE_NAME).unlink()
    edit(bundle / "manifest.json", earlier)
    text = words(run("inspect", bundle).out)
    assert "attention fused, 6 kernels in 6 blocks" in text
    assert "bytes: not recorded by the version that built it; export it again to have them" in text


def test_layers_of_another_build_than_the_manifest(bundle: Path, run: Callable[..., Any]) -> None:
    edit(bundle / "manifest.json", lambda data: data["engines"][TARGET.name]["profiles"][0].update(batch=[1, 3, 4]))
    run("inspect", bundle).refused(2, FILE_NAME, "profiles in the manifest", "rtx:sm86+sm89")


def test_an_estimate_is_of_16_bit_products(bundle: Path, run: Callable[..., Any]) -> None:
    def widen(data: Any) -> None:
        for layer in (layer for file in data["files"].values() for layer in file["layers"]):
            for tensor in (*layer["inputs"], *(layer["constants"] or ())):
                tensor[2] = "Float"

    edit(bundle / TARGET.folder / FILE_NAME, widen)
    text = words(run("inspect", bundle / FIRST).out)
    assert "conditioning 1 2.00 MB 2.00 MB 3.00 MB 7.00 MB 4.00" in text


def test_counts_of_several_profiles_say_so(tmp_path: Path, run: Callable[..., Any]) -> None:
    bundle = write_bundle(tmp_path / "bundle", ONE, PROFILE)
    text = words(run("inspect", bundle / FIRST).out)
    assert {"type profile 0 profile 1", "runtime_fusion 16 16", "all 32 32", "blocks.0 … blocks.3 4 7 7 1"} <= set(text)
    assert {"0 img_tokens 1024 1024 1024", "1 img_tokens 256 4096 16384"} <= set(text)
    whole = words(run("inspect", bundle).out)
    contract = whole[whole.index("profiles") :]  # the contract's; those of the target follow with it
    assert contract[1:5] == ["profile axis min opt max", "0 batch 1 1 1", "0 img_tokens 1024 1024 1024", "0 txt_tokens 77 77 333"]  # fmt: skip # noqa: E501
    assert "profile 0 batch 1:1:1, img_tokens 1024:1024:1024, txt_tokens 77:77:333" in whole
    assert any(line.startswith("kernels 92 of 2 profiles together: runtime_fusion 46") for line in whole)


def test_a_bundle(bundle: Path, run: Callable[..., Any]) -> None:
    result = run("inspect", bundle, "--json")
    text = words(result.err)
    start = text.index("engine rtx:sm86+sm89")
    assert text[start + 1 : text.index("", start)] == [
        "for TensorRT-RTX 1.7.1.116 and no other, compute capability 8.6, 8.9",
        "attention fused, 6 kernels in 6 blocks",
        "kernels 46: runtime_fusion 23, gemm 17, kgen 6",
        "by call conditioning: 1, img_embed: 1, txt_embed: 1, modulations.5.txt: 1, blocks.0 … blocks.4: 7 each, "
        "blocks.5: 5, final_modulation: 1, final: 1",
        "profile 0 batch 1:2:4, img_tokens 256:4096:16384, txt_tokens 2:333:512",
        "segment-0.engine 1.20 kB, conditioning … blocks.3, built in 12.3 s",
        "segment-1.engine 2.60 kB, blocks.4 … final, built in 12.3 s",
    ]
    assert "ort-cpu model.ort.onnx ONNX Runtime on CPU, fp16 through casts" in text
    assert "profiles" not in text  # the contract has one, which is its ranges
    assert "tensorrt-rtx-cu13 1.7.1.116" in text and "torch 2.13.0" in text
    data = result.json
    assert data["engines"][TARGET.name] == {
        "graph": "model.onnx", "dialect": "standard", **record_of(PROFILE).to_json()
    }  # fmt: skip
    assert data["versions"] == {"torch": "2.13.0", "tensorrt-rtx-cu13": "1.7.1.116"}
    assert f"{TARGET.folder}/{FILE_NAME}" in data["files"]


def test_attention_that_is_written_out(bundle: Path, run: Callable[..., Any]) -> None:
    def write_out(manifest: Any) -> None:
        entry = manifest["engines"][TARGET.name]
        entry["attention"] = "written out"
        for part in (entry, *entry["segments"]):
            part["fused_attentions"] = dict.fromkeys(part["fused_attentions"], 0)

    edit(bundle / "manifest.json", write_out)
    assert "attention written out" in words(run("inspect", bundle).out)


def test_runs() -> None:
    names = ["a", "m.0.x", "m.0.y", "b.0", "m.1.x", "m.1.y", "b.1", "b.2", "b.10", "end"]
    kernels = {"a": 2, "b.0": 5, "b.1": 5, "b.2": 4, "b.10": 5, "end": 1, "engine": 3}
    assert runs(names, kernels, {"b.0": 1, "b.1": 1}) == [
        Run("a", 1, (2, 0)),
        Run("m.0.x … m.1.x", 2, (0, 0)),
        Run("m.0.y … m.1.y", 2, (0, 0)),
        Run("b.0 … b.1", 2, (5, 1)),
        Run("b.2", 1, (4, 0)),
        Run("b.10", 1, (5, 0)),
        Run("end", 1, (1, 0)),
        Run("engine", 1, (3, 0)),
    ]


def test_an_engine_without_its_record_is_not_deserialized(
    bundle: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    alone = Path(shutil.copy(bundle / FIRST, tmp_path / "alone.engine"))
    run("inspect", alone).refused(2, str(alone), "layers.json", "would run what is in it", "its GPU", "mmdit-export")


def test_another_file_than_the_one_that_was_built(bundle: Path, run: Callable[..., Any]) -> None:
    path, before = bundle / FIRST, CONTENT[FIRST]
    path.write_bytes(before + b"!")
    run("inspect", path).refused(2, "1200 bytes", "1201 bytes")
    path.write_bytes(before[:-1] + b"!")
    run("inspect", path).refused(2, "SHA-256", hashlib.sha256(before).hexdigest())
    shutil.copy(bundle / SECOND, path)
    run("inspect", path).refused(2, "2600 bytes")
    run("inspect", path.rename(path.with_name("model.engine"))).refused(2, "segment-0.engine", "model.engine")
    run("inspect", path).refused(2, "does not exist")
    path.mkdir()
    run("inspect", path.parent).refused(2, "manifest.json")


def test_a_link_to_an_engine(bundle: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    link = tmp_path / "link.engine"
    link.symlink_to(bundle / FIRST)
    assert run("inspect", link, "--json").json["path"] == str(bundle / FIRST)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_record_of_files_that_are_not_in_the_bundle(bundle: Path, run: Callable[..., Any]) -> None:
    def elsewhere(manifest: Any) -> None:
        manifest["engines"][TARGET.name]["segments"][0]["file"] = "../segment-0.engine"

    edit(bundle / "manifest.json", elsewhere)
    run("inspect", bundle).refused(2, "manifest.json", "../segment-0.engine")


def test_a_broken_record(bundle: Path, run: Callable[..., Any]) -> None:
    edit(bundle / TARGET.folder / FILE_NAME, lambda data: data["engine"].pop("version"))
    run("inspect", bundle / FIRST).refused(2, "no version", "export it again")
    edit(bundle / "manifest.json", lambda data: data["engines"][TARGET.name].pop("segments"))
    run("inspect", bundle).refused(2, FILE_NAME)  # a changed file, which is found first
    (bundle / TARGET.folder / FILE_NAME).unlink()
    edit(bundle / "manifest.json", lambda data: data["files"].pop(f"{TARGET.folder}/{FILE_NAME}"))
    run("inspect", bundle).refused(2, "no segments")


def places(value: Any, *steps: Any) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in items:
        yield (*steps, step)
        yield from places(item, *steps, step)


ODD = (None, -1, 10**400, math.nan, EVIL, [], {}, [EVIL], {EVIL: EVIL})


@pytest.mark.parametrize("each", [4, pytest.param(1, marks=pytest.mark.soak)])  # of nine values; 4 takes all in turn
@pytest.mark.parametrize("name", ["manifest.json", f"{TARGET.folder}/{FILE_NAME}"])
def test_any_other_value_anywhere_gives_no_traceback(
    name: str, each: int, bundle: Path, run: Callable[..., Any]
) -> None:
    path = bundle / name
    document = json.loads(path.read_text())
    if name != "manifest.json":
        for file in document["files"].values():
            del file["layers"][2:]  # the others are alike
        document["engine"]["segments"][0]["calls"] = document["engine"]["segments"][0]["calls"][-2:]
    statuses: Counter[int] = Counter()
    for steps, odd in itertools.islice(itertools.product(places(document), ODD), 0, None, each):
        if steps[0] in ("spec", "files"):  # others read these, before anything of ours
            continue
        changed = copy.deepcopy(document)
        functools.reduce(lambda at, step: at[step], steps[:-1], changed)[steps[-1]] = odd
        path.write_text(json.dumps(changed))
        result = run("inspect", bundle if name == "manifest.json" else bundle / FIRST)
        assert result.status in (0, 2), f"{steps} {odd}: {result.err}"
        assert not set("\x1b\r\u202e") & set(result.out + result.err), f"{steps} {odd!r}"
        statuses[result.status] += 1
    assert statuses[2] > 500 / each and statuses[0] > 10 / each


def test_starting_imports_nothing_heavy() -> None:
    code = "import sys; import mmdit_deploy.cli.inspect as c; c.parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "onnx", "tensorrt", "tensorrt_rtx"} & set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_what_an_export_built(checkpoint: Path, dist: Path, run: Callable[..., Any]) -> None:
    arguments = ("--batch", "1:1:2", "--img-tokens", "4:16:48", "--txt-tokens", "2:8:16")
    exported = run("export", checkpoint, "--fp16", "--target", "rtx:sm89", *arguments, "-o", dist / "b")
    assert exported.status == 0, exported.err
    whole = run("inspect", dist / "b", "--json")
    assert whole.status == 0, whole.err
    entry = whole.json["engines"]["rtx:sm89"]
    assert entry["attention"] == "fused" and entry["fused_attentions"] == {"blocks.0": 1, "blocks.1": 1}
    assert "attention fused, 2 kernels in 2 blocks" in words(whole.err)
    layers = []
    for i, segment in enumerate(entry["segments"]):
        one = run("inspect", dist / "b" / segment["file"], "--json").json
        assert {**entry, **one["engine"]} == entry and one["segment"] == i and one["bytes"] == segment["bytes"]
        layers += [EngineLayer.from_json(layer) for layer in one["layers"]]
    assert sum(layer.is_kernel for layer in layers) == entry["kernels"]["total"]
    assert sum(layer.is_fused_attention for layer in layers) == 2
