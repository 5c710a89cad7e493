"""What this machine is: what a figure or a verdict was made on."""

from __future__ import annotations

import platform
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from mmdit_deploy.build import RTX, TENSORRT

# The two builds of ONNX Runtime are two packages, each with a version.
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu")
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/version")
_SMI_SECONDS = 10.0  # where the driver hangs, so does nvidia-smi


def machine_facts() -> dict[str, Any]:
    """This machine's processors, its NVIDIA driver, and the versions of what runs engines. It never fails.

    Returns:
        JSON-ready: ``system``, ``cpu``, ``cores``, ``memory_gb``; ``gpu`` (torch's current one), ``driver`` and
        ``cuda`` (torch's), None where there is none; and of ``torch``, the builds of ONNX Runtime, ``tensorrt-rtx`` and
        ``tensorrt`` the versions of those that are installed.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": _gpu(),
        "driver": nvidia_driver(),
        "cuda": torch.version.cuda,
        **_versions(),
    }


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, e.g. ``580.95.05``; None where there is none that says it.

    torch knows only which CUDA the driver serves. The kernel module says it at once; where its file is not to be seen
    (WSL, some containers), nvidia-smi is asked.
    """
    try:
        said = _NVIDIA.read_text(encoding="utf-8", errors="replace")
    except OSError:
        said = _nvidia_smi()
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 …", or the version alone
    version = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", said)
    return version[0] if version else None


def _nvidia_smi() -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SMI_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu() -> str | None:
    try:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except (AssertionError, RuntimeError):  # a GPU that cannot be asked
        return None


def _cpu() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    for flavour in (RTX, TENSORRT):
        if version := flavour.version():
            found[flavour.module.replace("_", "-")] = version
    return found
