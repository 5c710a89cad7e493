"""Starting a command is quick, and everything imports where optional packages are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmdit_deploy

TREE = Path(mmdit_deploy.__file__).parents[1]


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TREE)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", ["export", "optimize", "verify", "bench"])
def test_a_command_imports_nothing_heavy(command: str) -> None:
    heavy = ("torch", "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "diffusers", "safetensors")
    code = f"import sys; import mmdit_deploy.cli.{command} as c; c.parser().format_help(); print(*sys.modules)"
    assert not set(heavy) & set(python(code).split())


def test_every_module_imports_without_the_optional_packages() -> None:
    code = """
import importlib, pkgutil, sys
for name in ("onnxruntime", "diffusers", "tensorrt", "tensorrt_rtx", "openvino", "polygraphy"):
    sys.modules[name] = None  # importing it raises ImportError
import mmdit_deploy
names = [m.name for m in pkgutil.walk_packages(mmdit_deploy.__path__, "mmdit_deploy.")]
about_diffusers = ["mmdit_deploy.diffusers.transformer"]  # a subclass of what it would import
for name in names:
    if name not in about_diffusers:
        importlib.import_module(name)
from mmdit_deploy.errors import MissingPackageError
try:
    from mmdit_deploy.diffusers import MMDiTEngineTransformer
except MissingPackageError as error:
    print(error.fix)
print(len(names))
"""
    fix, count = python(code).splitlines()
    assert int(count) > 60 and "mmdit-deploy[diffusers]" in fix
