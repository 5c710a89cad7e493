"""The engines that are built where none is named: what this machine can run, and what is installed."""

from __future__ import annotations

import dataclasses

import pytest

from mmdit_deploy.build import RTX, TENSORRT
from mmdit_deploy.export import default_targets, machine
from mmdit_deploy.spec import precision


@pytest.mark.parametrize(
    ("gpu", "installed", "expected"),
    [
        (None, {"rtx"}, ("ort-cpu", "rtx:sm89")),
        (None, set(), ("ort-cpu",)),
        (None, {"trt", "ort-cuda"}, ("ort-cpu",)),  # neither is built, nor runs, without a GPU
        ((8, 9), {"rtx", "trt", "ort-cuda"}, ("ort-cuda", "rtx:sm89")),
        ((12, 0), {"rtx"}, ("rtx:sm120",)),
        ((9, 0), {"rtx", "trt", "ort-cuda"}, ("ort-cuda", "trt")),  # TensorRT-RTX has no kernels for it
        ((8, 6), {"trt"}, ("trt",)),
        ((9, 0), {"rtx", "ort-cuda"}, ("ort-cuda",)),
        ((9, 0), {"rtx"}, ("ort-cpu",)),
        ((7, 0), set(), ("ort-cpu",)),
    ],
)
def test_default_targets(
    gpu: tuple[int, int] | None, installed: set[str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: gpu)
    monkeypatch.setattr(machine, "_runs", lambda provider: "ort-cuda" in installed)
    for name, flavour in (("RTX", RTX), ("TENSORRT", TENSORRT)):
        short = {"RTX": "rtx", "TENSORRT": "trt"}[name]
        packages = ("no-such-package", "numpy") if short in installed else ("no-such-package",)
        monkeypatch.setattr(machine, name, dataclasses.replace(flavour, distributions=packages, minimum="1"))
    assert default_targets() == expected
    assert default_targets(precision("fp8")) == expected
    assert default_targets(precision("fp4")) == tuple(
        "rtx:sm120" if t == "rtx:sm89" and not gpu else t for t in expected
    )
