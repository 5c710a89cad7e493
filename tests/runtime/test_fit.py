"""Whether an engine fits this machine, said before any of it is deserialized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_deploy.build import RTX, TENSORRT, EngineRecord, parse_target
from mmdit_deploy.build.flavours import Flavour
from mmdit_deploy.errors import MachineError, MissingPackageError
from mmdit_deploy.runtime import TensorRTEngine, check_runs_here
from mmdit_deploy.runtime.fit import check_header, either
from mmdit_deploy.runtime.loading import error_log

Build = Callable[..., tuple[EngineRecord, list[Path]]]


def refusal(build: Build, target: str = "rtx:sm89", **how: Any) -> MachineError:
    record, files = build(target, **how)
    with pytest.raises(MachineError) as caught:
        TensorRTEngine(record, files)
    assert caught.value.exit_status == 3
    with pytest.raises(type(caught.value)) as again:
        check_runs_here(record, parse_target(target))
    assert str(again.value) == str(caught.value)
    return caught.value


def test_what_fits_is_not_refused(fake: Any, build: Build) -> None:
    for target, capabilities in (("rtx:sm89", ("8.9",)), ("rtx:sm86+sm89", ("8.6", "8.9")), ("trt", ("8.9",))):
        check_runs_here(build(target, capabilities=capabilities)[0], parse_target(target))


@pytest.mark.parametrize(
    ("target", "capabilities", "gpu", "fix"),
    [
        ("rtx:sm89", ("8.9",), (8, 6), "--target rtx:sm86"),
        ("rtx:sm86+sm89", ("8.6", "8.9"), (12, 0), "--target rtx:sm120"),
        ("rtx:sm89", ("8.9",), (9, 0), "--target trt"),  # TensorRT-RTX does not build for it
        ("trt", ("9.0",), (8, 9), "--target trt"),
    ],
)
def test_another_gpu(
    fake: Any, build: Build, target: str, capabilities: tuple[str, ...], gpu: tuple[int, int], fix: str
) -> None:
    fake.gpu = gpu
    error = refusal(build, target, capabilities=capabilities)
    assert str(error.fix) == f"mmdit-export … {fix}"
    assert "{}.{}".format(*gpu) in str(error.received) and ", ".join(capabilities) in error.rule
    assert not fake.events  # nothing was read, let alone deserialized


@pytest.mark.parametrize("target", ["rtx:sm89", "trt"])
@pytest.mark.parametrize("version", ["1.7.1.115", "1.7.2.116", "1.8.0.3", "1.7.1"])
def test_another_version(fake: Any, build: Build, target: str, version: str) -> None:
    error = refusal(build, target, version=version)
    flavour = parse_target(target).flavour
    assert flavour is not None
    assert version in error.rule and "1.7.1.116" in str(error.received)
    assert f"mmdit-export … --target {target} --force" in str(error.fix)
    assert f"pip install {flavour.distributions[0]}=={version}" in str(error.fix)
    assert not fake.events


def test_a_package_that_was_packaged_again_holds_the_same_version(fake: Any, build: Build) -> None:
    for version in ("1.7.1.116.post1", "1.7.1.116+cu13"):
        check_runs_here(build(version=version)[0], parse_target("rtx:sm89"))


def test_no_gpu(fake: Any, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    error = refusal(build)
    assert "8.9" in error.rule and error.received == "torch finds no GPU"
    remedies = ["run it on a machine with such a GPU, and a torch with CUDA", "mmdit-export … --target ort-cpu"]
    assert str(error.fix).split("; or: ") == remedies
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "which has no CUDA" in str(refusal(build).received)
    assert not fake.events


def test_each_remedy_is_said_once() -> None:
    assert either("a") == "a" and either("a", "b", "a") == "a; or: b"
    assert either(either("a", "b"), either("b", "c")) == "a; or: b; or: c"


def test_no_tensorrt(fake: Any, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Flavour, purpose: str) -> Any:
        raise MissingPackageError(self.distributions[0], purpose=purpose, install=self.install)

    monkeypatch.setattr(Flavour, "version", lambda self: None)
    monkeypatch.setattr(Flavour, "load", load)
    for target, flavour in (("rtx:sm89", RTX), ("trt", TENSORRT)):
        error = refusal(build, target)
        assert isinstance(error, MissingPackageError) and error.fix == flavour.install and target in error.rule


@pytest.mark.parametrize(
    ("diagnosis", "received", "fix"),
    [
        (1, "version mismatch", "--target rtx:sm89 --force"),
        (2 | 32, "unsupported cc, malformed engine", "--target rtx:sm89 --force"),
        (4, "old cuda driver", "update the NVIDIA driver"),
        (2 | 64, "unsupported cc, cuda error", "nvidia-smi"),
    ],
)
def test_the_runtime_itself_is_asked_before_anything_is_deserialized(
    fake: Any, build: Build, diagnosis: int, received: str, fix: str
) -> None:
    record, files = build()
    fake.diagnosis = diagnosis
    with pytest.raises(MachineError) as caught:
        TensorRTEngine(record, files)
    assert str(caught.value.received) == f"segment-0.engine: {received}" and fix in str(caught.value.fix)
    assert fake.events == ["header"]


def test_every_segment_is_asked_about_before_the_first_is_deserialized(fake: Any, build: Build) -> None:
    TensorRTEngine(*build())
    assert fake.events[:6] == ["header"] * 3 + ["load"] * 3


def test_tensorrt_cannot_be_asked(fake: Any, build: Build) -> None:
    fake.diagnosis = 32
    TensorRTEngine(*build("trt"))
    assert "header" not in fake.events and fake.count("load") == 3


def test_what_the_real_runtime_says_of_a_file_that_is_no_engine(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    file = tmp_path / "segment-0.engine"
    file.write_bytes(b"x" * 1000)
    target = parse_target("rtx:sm89")
    with pytest.raises(MachineError) as caught:
        check_header(trt, trt.Runtime(error_log(trt)), file, target, "rebuild it")
    assert caught.value.received == "segment-0.engine: malformed engine" and caught.value.fix == "rebuild it"
    assert RTX.name in caught.value.rule
