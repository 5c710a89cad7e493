"""Bundles with TensorRT engines, each exported once, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, ExportResult, export
from mmdit_deploy.spec import PRECISIONS, ModelSpec

RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(2, 8, 16)}


@dataclass(frozen=True)
class Exported:
    """A bundle that is shared by tests, and what was said while it was made."""

    path: Path
    said: tuple[str, ...]
    result: ExportResult

    @property
    def fields(self) -> dict[str, Any]:
        return dict(open_bundle(self.path).manifest.fields)

    def verdict(self, target: str) -> dict[str, Any]:
        verdicts = json.loads((self.path / "parity.json").read_text())["verdicts"]
        return next(v for v in verdicts if v["target"] == target)


@pytest.fixture(scope="module", autouse=True)
def _short_trajectories(short_trajectories: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Exports calibrate on little here: what calibration finds is tested elsewhere."""
    with short_trajectories():
        yield


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: what is said of an engine that cannot run is tested here."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="session")
def deep_spec(tiny_spec: ModelSpec) -> ModelSpec:
    """Three blocks: a first, a middle and a last one."""
    return dataclasses.replace(tiny_spec, depth=3)


@pytest.fixture(scope="session")
def export_once(
    traced_once: Callable[[], contextlib.AbstractContextManager[object]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """Exports once for each set of arguments: ``export_once(spec, "ort-cpu", precision="fp16", verify=True)``."""
    made: dict[str, Exported] = {}

    def run(spec: ModelSpec, *targets: str, precision: str = "fp16", **options: Any) -> Exported:
        key = repr((spec, targets, precision, options))
        if key not in made:
            made[key] = make(spec, targets, precision, **options)
        return made[key]

    def make(spec: ModelSpec, targets: tuple[str, ...], precision: str, **options: Any) -> Exported:
        out = tmp_path_factory.mktemp("engines") / "b"
        compute = PRECISIONS[precision]
        request = ExportRequest(
            spec, RandomWeights(0), compute, targets=targets, out=out, **{"ranges": RANGES, **options}
        )
        said: list[str] = []
        with traced_once(), one_thread(), mock.patch("torch.cuda.is_available", lambda: False):
            result = export(request, said.append)
        return Exported(out, tuple(said), result)

    return run


@pytest.fixture(scope="session")
def exported(deep_spec: ModelSpec, tensorrt_rtx: Any, export_once: Callable[..., Exported]) -> Callable[..., Exported]:
    """Exports of three SD3 blocks, with engines of TensorRT-RTX: ``exported("rtx:sm89", verify=False)``."""
    return functools.partial(export_once, deep_spec)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """These models are too small for two: the pools of PyTorch and ONNX Runtime would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """What a module runs, it runs on one thread."""
    with one_thread():
        yield
