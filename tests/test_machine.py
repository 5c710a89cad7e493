"""What is said of this machine, and that saying it never fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mmdit_deploy import machine
from mmdit_deploy.build import RTX
from mmdit_deploy.machine import machine_facts, nvidia_driver
from mmdit_deploy.report.words import machine_words

# As the kernel modules say it: NVIDIA's own, and the open one.
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  12.3.0\n"
)
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22-I3)  "
    "Tue Sep 23 10:11:16 UTC 2025\nGCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel module would say its version; not there until it is written."""
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path / "version")
    return tmp_path / "version"


def says(output: str) -> Any:
    return lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=output, stderr="")


def test_the_facts_are_json_and_name_what_is_installed() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] == psutil.cpu_count() and facts["memory_gb"] > 0 and facts["cpu"]
    assert facts["torch"] == torch.__version__ and facts["cuda"] == torch.version.cuda
    assert facts.get("tensorrt-rtx") == RTX.version()
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())


@pytest.mark.parametrize(("said", "driver"), [(CLOSED, "535.104.05"), (OPEN, "580.95.05"), ("", None)])
def test_the_kernel_module_says_the_driver(
    module: Path, monkeypatch: pytest.MonkeyPatch, said: str, driver: str | None
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("there is no need to ask"))
    module.write_text(said)
    assert nvidia_driver() == driver == machine_facts()["driver"]


@pytest.mark.parametrize(
    ("said", "driver"),
    [("580.95.05\n580.95.05\n", "580.95.05"), ("550.54\n", "550.54"), ("No devices were found\n", None), ("", None)],
)
def test_otherwise_nvidia_smi_does(
    module: Path, monkeypatch: pytest.MonkeyPatch, said: str, driver: str | None
) -> None:
    monkeypatch.setattr(subprocess, "run", says(said))
    assert nvidia_driver() == driver


@pytest.mark.parametrize(
    "error", [FileNotFoundError("nvidia-smi"), PermissionError(), subprocess.TimeoutExpired("nvidia-smi", 10.0)]
)
def test_it_never_fails(module: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    def broken() -> str:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(machine, "_CPUINFO", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    facts = machine_facts()
    assert facts["gpu"] is None and facts["driver"] is None and isinstance(facts["cpu"], str)


def test_in_words() -> None:
    assert machine_words({}) == ""
    words = machine_words({"system": "Linux x86_64", "cores": 2, "gpu": None, "driver": None, "torch": "2.13.0"})
    assert words == "Linux x86_64, 2 cores; torch finds no GPU; torch 2.13.0"
