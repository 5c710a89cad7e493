"""A small fake bundle, and child processes that export one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mmdit_deploy
from mmdit_deploy.bundle import staged_bundle, write_manifest
from mmdit_deploy.contract import Contract
from mmdit_deploy.spec import PRECISIONS, ModelSpec

SPEC = ModelSpec(name="mini", depth=2, num_heads=2, dual_attention_blocks=(0,))
CONTENT = {
    "model.onnx": b"graph",
    "weights.safetensors": bytes(range(256)) * 40,
    "engines/ort-cpu/model.ort": b"engine",
    "report.html": b"",
}


@pytest.fixture
def fields() -> dict[str, Any]:
    """The manifest's fields that `open_bundle` reads."""
    contract = Contract.of(SPEC, PRECISIONS["fp16"])
    return {
        "name": "mini",
        "spec": SPEC.to_json(),
        "contract": contract.to_json(),
        "precision": "fp16",
        "weights": {"origin": "random (seed 0)", "random": True, "seed": 0},
        "engines": {"ort-cpu": {"graph": "model.onnx"}},
        "outputs": ["blocks.0"],
    }


@pytest.fixture
def fill(fields: dict[str, Any]) -> Callable[..., None]:
    """Writes the files and the manifest of a bundle; `mark` goes into the graph, to tell bundles apart."""

    def write(directory: Path, mark: bytes = b"") -> None:
        for name, data in CONTENT.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data + (mark if name == "model.onnx" else b""))
        write_manifest(directory, fields)

    return write


@pytest.fixture
def bundle(tmp_path: Path, fill: Callable[..., None]) -> Path:
    """A whole bundle at ``out/mini``."""
    final = tmp_path / "out" / "mini"
    with staged_bundle(final, force=False) as directory:
        fill(directory)
    return final


_CHILD = """
import signal, sys
from pathlib import Path
from mmdit_deploy.bundle import staged_bundle
from mmdit_deploy.errors import MMDiTError
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with SIGINT ignored
try:
    with staged_bundle(Path(sys.argv[1]), force=False) as directory:
        (directory / "weights.safetensors").write_bytes(b"half")
        print(directory, flush=True)
        sys.stdin.readline()
        (directory / "model.onnx").write_bytes(b"child")
except MMDiTError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
except KeyboardInterrupt:
    sys.exit(130)
"""


class Exporter:
    """A child process in the middle of an export."""

    def __init__(self, final: Path):
        root = str(Path(mmdit_deploy.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(final)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert self.process.stdout is not None
        self.directory = Path(self.process.stdout.readline().strip())

    def finish(self) -> tuple[int, str]:
        """Lets the child go on to its end; its exit status and what it said on standard error."""
        _, errors = self.process.communicate("go on\n", timeout=10)
        return self.process.returncode, errors

    def signal(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=10)
        return self.process.returncode


@pytest.fixture
def exporter() -> Iterator[Callable[[Path], Exporter]]:
    """Starts exporters, and ends those that a failed test left."""
    started: list[Exporter] = []

    def start(final: Path) -> Exporter:
        started.append(Exporter(final))
        return started[-1]

    yield start
    for child in started:
        if child.process.poll() is None:
            child.process.kill()
            child.process.communicate()
