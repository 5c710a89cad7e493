"""The TensorRT back end, built from the real headers and run on a TensorRT and a GPU that are not there.

NVIDIA's headers are no package of Debian's or PyPI's. TENSORRT_INCLUDE_DIR=… names the folder of NvInferRuntime.h, as
`include` of github.com/NVIDIA/TensorRT is one, CUDA_INCLUDE_DIR that of cuda_runtime_api.h; without, these are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Spec = tuple[str, tuple[str | int, ...]]

X: Spec = ("hidden_states", ("batch", "img_tokens", 4))
T: Spec = ("timestep", ("batch",))
M: Spec = ("modulation", ("batch", 3))
H: Spec = ("h", ("batch", "img_tokens", 8))
C: Spec = ("c", ("batch", 3))
TAP: Spec = ("tap", ("batch", "img_tokens", 8))
G: Spec = ("g", ("batch", "img_tokens", 8))
Y: Spec = ("sample", ("batch", "img_tokens", 4))
# c is read by the last segment only; the tap is an output that a later segment reads too.
CONDITIONING = (((T,), (M,)),)
TRUNK = (((X, M), (H, C)), ((H,), (TAP, G)), ((G, C, TAP, X), (Y,)))
RANGES = {"batch": [1, 2, 4], "img_tokens": [2, 8, 64]}
PROFILES = [{"batch": [1, 2, 2], "img_tokens": [2, 4, 8]}, {"batch": [1, 2, 3], "img_tokens": [2, 32, 64]}]
NOTHING_LEFT = "left: 0 allocations, 0 streams, 0 events, 0 contexts, 0 operations"
SOUND = f"88 right, 0 wrong\n{NOTHING_LEFT}\n"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, release: Path) -> Path:
    """The program that runs chains, and what it needs."""
    return build_chain(tmp_path_factory.mktemp("fake-tensorrt"), release, ROOT / "engines/cpp")


def build_chain(build: Path, release: Path, library: Path) -> Path:
    """Builds the fakes and the program in a folder, over the library whose sources are in another."""
    headers = Path(os.environ.get("TENSORRT_INCLUDE_DIR", "/usr/include/x86_64-linux-gnu")).resolve()
    cuda = Path(os.environ.get("CUDA_INCLUDE_DIR", "/usr/local/cuda/include")).resolve()
    if not (headers / "NvInferRuntime.h").exists() or not (cuda / "cuda_runtime_api.h").exists():
        pytest.skip("no TensorRT headers: TENSORRT_INCLUDE_DIR and CUDA_INCLUDE_DIR name their folders")
    (build / "unused_methods.h").write_text(unused_methods((headers / "NvInferImpl.h").read_text()))
    options = [
        f"-DTENSORRT_INCLUDE_DIR={headers}",
        f"-DTENSORRT_CUDA_INCLUDE_DIR={cuda}",
        f"-DGENERATED_DIR={build}",
        f"-DLIBRARY_DIR={library}",
        f"-Dnlohmann_json_DIR={release.parent / 'headers/share/cmake/nlohmann_json'}",
    ]
    _make(["cmake", "-S", HERE / "tensorrt", "-B", build, *options])
    _make(["cmake", "--build", build, "-j", "2"])
    return build


def _make(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def unused_methods(header: str) -> str:
    """Classes that implement what TensorRT's headers declare: every method ends the process."""
    text = "#include <cstdlib>\nnamespace unused {\nusing namespace nvinfer1;\n"
    for name in ("VRuntime", "VRuntimeConfig", "VCudaEngine", "VExecutionContext"):
        body = re.search(rf"class {name} : public VRoot\n{{(.*?)\n}};", header, re.DOTALL)
        assert body is not None, name
        methods = re.findall(r"virtual ([^;]*?) = 0;", body[1])
        text += f"struct {name} : apiv::{name} {{\n"
        text += "".join(f"    {' '.join(method.split())} override {{ std::abort(); }}\n" for method in methods) + "};\n"
    return text + "}\n"


def _tensors(specs: Sequence[Spec]) -> list[dict[str, Any]]:
    return [{"name": name, "axes": list(axes), "dtype": "float32"} for name, axes in specs]


def _contract(inputs: Sequence[Spec], outputs: Sequence[Spec]) -> dict[str, Any]:
    return {"inputs": _tensors(inputs), "outputs": _tensors(outputs), "ranges": RANGES, "profiles": PROFILES}


def write_bundle(folder: Path, *, split: bool, **changes: Any) -> Path:
    """A bundle of engines that the fake TensorRT reads."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")

    def engine(name: str, segments: Any, profiles: Any) -> dict[str, Any]:
        files = []
        for index, (inputs, outputs) in enumerate(segments):
            file = folder / f"engines/trt/{name}-{index}.engine"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [("in", *spec) for spec in inputs] + [("out", *spec) for spec in outputs]
            file.write_text("".join(f"{mode} {n} {' '.join(map(str, axes))}\n" for mode, n, axes in lines))
            path = file.relative_to(folder).as_posix()
            files.append({"file": path, "inputs": _tensors(inputs), "outputs": _tensors(outputs)})
        built = {"flavour": "TensorRT", "version": "11.1.0.106", "capabilities": ["8.9"], **changes}
        return {"graph": "model.onnx", **built, "profiles": profiles, "segments": files}

    if split:
        wide = [{**PROFILES[0], "batch": RANGES["batch"]}]
        trt = {**engine("trunk", TRUNK, PROFILES), "conditioning": engine("conditioning", CONDITIONING, wide)}
        parts = {"conditioning": _contract((T,), (M,)), "trunk": _contract((X, M), (Y, TAP))}
    else:
        trt, parts = engine("segment", CONDITIONING + TRUNK, PROFILES), None
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": 2 if split else 1,
        "name": "chain",
        "precision": "fp32",
        "spec": {"depth": 1},
        "contract": _contract((X, T), (Y, TAP)),
        "weights": {"origin": "none", "random": False},
        "outputs": [],
        "engines": {"trt": trt},
        "split": parts,
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def start_chain(chain: Path, bundle: Path, refuse: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{chain}:{chain / 'mmdit'}", "FAKE_TRT": refuse}
    return subprocess.run([chain / "chain", bundle], env=environment, capture_output=True, text=True, check=False)


def run_chain(chain: Path, bundle: Path, refuse: str = "") -> list[str]:
    """What the program prints: it ends well, whatever fails, and leaves nothing on the GPU."""
    done = start_chain(chain, bundle, refuse)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[-1] in (NOTHING_LEFT, "0 right, 0 wrong"), lines
    assert not [line for line in lines if line.startswith("wrong:")], lines
    return lines


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_segments_run_as_one_engine(chain: Path, tmp_path: Path, split: bool) -> None:
    assert run_chain(chain, write_bundle(tmp_path / "bundle", split=split)) == SOUND.splitlines()


REFUSALS = {
    "runtime": "MachineError: TensorRT makes a runtime",
    "load": "the file is broken",
    "host": "is in the host's memory",
    "context": "makes an execution context of",
    "profile": "selects profile 0 of",
    "second profile": "selects profile 0 of",
    "enqueue": "enqueues engines/trt",
    "second enqueue": "enqueues engines/trt",
    "shape": "is refused",
    "record": "BundleError",
}


@pytest.mark.parametrize("refuse", REFUSALS)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_what_tensorrt_refuses_is_an_error_and_nothing_is_left(
    chain: Path, tmp_path: Path, refuse: str, split: bool
) -> None:
    lines = run_chain(chain, write_bundle(tmp_path / "bundle", split=split), refuse)
    assert REFUSALS[refuse] in "\n".join(lines)
    assert "0 wrong" in "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "10.15.1.29"}, "which built it, and in no other"),
        ({"capabilities": ["9.0", "10.0"]}, "Fake GPU, which has 8.9"),
        ({"flavour": "TensorRT-RTX"}, "an engine of 'TensorRT-RTX'"),
    ],
)
def test_an_engine_that_does_not_fit_is_not_loaded(
    chain: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in "\n".join(run_chain(chain, write_bundle(tmp_path / "bundle", split=False, **changes)))


# What orders the work, each time without one thing: a file of engines/cpp/src, what is there, and what instead.
FAULTS = {
    "calls do not wait for the one before": ("work_stream.h", "if (used_) gpu_->wait(work, done_.get());", ""),
    "the caller's stream is not waited for": ("work_stream.h", "gpu_->wait(work, caller_ready_.get());", ""),
    "the caller's stream does not wait": (
        "work_stream.h",
        "if (caller) stream.gpu_->wait(*caller, stream.done_.get());",
        "",
    ),
    "a call's end is noted elsewhere": (
        "work_stream.h",
        "stream.gpu_->record(stream.done_.get(), work);",
        "stream.gpu_->record(stream.done_.get(), stream.own_.get());",
    ),
    "a tensor is freed on another stream": (
        "tensorrt.cpp",
        "gpu_.free_on(found->second, stream_);",
        "gpu_.free_on(found->second, nullptr);",
    ),
    "what is left of a call is freed on another stream": (
        "tensorrt.cpp",
        "gpu_.free_on(memory, stream_);",
        "gpu_.free_on(memory, nullptr);",
    ),
    "a tensor comes on another stream": (
        "tensorrt.cpp",
        "gpu_.allocate_on(bytes, stream_);",
        "gpu_.allocate_on(bytes, nullptr);",
    ),
    "an input is copied on another stream": (
        "tensorrt.cpp",
        "tensor.data, bytes_of(tensor), stream);",
        "tensor.data, bytes_of(tensor), nullptr);",
    ),
    "an output is copied on another stream": (
        "tensorrt.cpp",
        "bytes_of(outputs.at(name)), stream);",
        "bytes_of(outputs.at(name)), nullptr);",
    ),
    "an engine does not wait for its last call": (
        "tensorrt.cpp",
        "      gpu_->synchronize();\n      kernels_",
        "      kernels_",
    ),
    "a table is not waited for": (
        "engine.cpp",
        "if (state_->gpu) state_->gpu->synchronize(stream);",
        "",
    ),
    "a call's table is freed on another stream": (
        "device_memory.cpp",
        "gpu->free_on(memory, stream);",
        "gpu->free_on(memory, nullptr);",
    ),
    "a call waits for the device": (
        "engine.cpp",
        "Conditioning::Table::Life::call);",
        "Conditioning::Table::Life::schedule);",
    ),
    "an upload is not waited for": (
        "buffer.cpp",
        "gpu_->upload(data(), from, bytes, stream);\n  gpu_->synchronize(stream);",
        "gpu_->upload(data(), from, bytes, stream);",
    ),
}


@pytest.mark.soak
def test_the_fake_gpu_finds_work_out_of_order(tmp_path: Path, release: Path) -> None:
    library = Path(shutil.copytree(ROOT / "engines/cpp", tmp_path / "library"))
    (tmp_path / "build").mkdir()
    chain = build_chain(tmp_path / "build", release, library)
    bundles = [write_bundle(tmp_path / name, split=name == "split") for name in ("whole", "split")]
    assert [start_chain(chain, bundle).stdout for bundle in bundles] == [SOUND, SOUND]
    missed = []
    for fault, (file, there, instead) in FAULTS.items():
        source = library / "src" / file
        text = source.read_text()
        assert text.count(there) == 1, fault
        source.write_text(text.replace(there, instead))
        _make(["cmake", "--build", chain, "-j", "2"])
        if all(start_chain(chain, bundle).stdout == SOUND for bundle in bundles):
            missed.append(fault)
        source.write_text(text)
    assert not missed
