"""The C++ runtime, built by the Makefile, and tiny bundles to run."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from traces import Traces

ROOT = Path(__file__).parents[2]
HEADERS_MISSING = "the C++ runtime's headers are downloaded"  # as debian_headers.py says without a network
RANGES = {"batch": Range(1, 2, 8), "img_tokens": Range(1, 64, 4096), "txt_tokens": Range(1, 16, 256)}
GRID, TEXT = (4, 5), 7


def missing_packages() -> str | None:
    """What Debian's packages for building C++ would bring, where it is not there."""
    absent = [tool for tool in ("cmake", "c++", "make") if shutil.which(tool) is None]
    if not absent:
        header = subprocess.run(
            ["c++", "-E", "-x", "c++", "-"],
            input="#include <openssl/evp.h>\n",
            text=True,
            capture_output=True,
            check=False,
        )
        absent = ["openssl/evp.h"] * (header.returncode != 0)
    return f"no {', '.join(absent)}: apt install make cmake g++ libssl-dev" if absent else None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Test processes build one after another."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """Builds the C++ runtime: ``built("release")``, or ``sanitized`` or ``threads``, gives its folder."""
    missing = missing_packages()
    if missing:
        pytest.skip(missing)

    def build(name: str) -> Path:
        environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
        with _alone(ROOT / "dist/cpp/.lock"):
            done = subprocess.run(
                ["make", "cpp-builds", f"CPP_BUILDS={name}"],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode and HEADERS_MISSING in done.stderr:
            pytest.skip(f"headers missing: {done.stderr[done.stderr.index(HEADERS_MISSING) :]}")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return ROOT / "dist/cpp" / name

    return build


@pytest.fixture(scope="session")
def release(built: Callable[[str], Path]) -> Path:
    """The build that users would make."""
    return built("release")


@pytest.fixture(scope="session")
def sanitized(built: Callable[[str], Path]) -> Path:
    """The build that AddressSanitizer and UndefinedBehaviorSanitizer watch: what they find ends it."""
    return built("sanitized")


@pytest.fixture(scope="session")
def flow_spec(tiny_spec: ModelSpec) -> ModelSpec:
    """A tiny model whose velocity has the channels of its latent."""
    return dataclasses.replace(tiny_spec, out_channels=tiny_spec.latent_channels)


@pytest.fixture(scope="session")
def bundle_of(run_folder: Path, flow_spec: ModelSpec, traces: Traces) -> Callable[..., Path]:
    """A bundle for ort-cpu with random weights, made once for all test processes: ``bundle_of("fp16", split=True)``."""
    folder = run_folder / "cpp-bundles"

    def bundle(precision: str = "fp32", *, split: bool = False) -> Path:
        out = folder / (precision + "-split" * split)
        with _alone(folder / ".lock"):
            if out.exists():
                return out
            request = ExportRequest(
                flow_spec,
                RandomWeights(0),
                PRECISIONS[precision],
                out=out,
                ranges=RANGES,
                targets=("ort-cpu",),
                verify=False,
                split_conditioning=split,
            )
            with traces.within(flow_spec):
                export(request)
        return out

    return bundle


@pytest.fixture
def bundle(bundle_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle to break."""
    return Path(shutil.copytree(bundle_of(), tmp_path / "bundle"))


@pytest.fixture(scope="session")
def start(flow_spec: ModelSpec) -> SimpleNamespace:
    """Noise [2, 20, C], and what the text encoders would give with and without a prompt."""
    generator = torch.Generator().manual_seed(0)

    def text() -> Mapping[str, Tensor]:
        return {
            "encoder_hidden_states": torch.randn(2, TEXT, flow_spec.txt_dim, generator=generator),
            "pooled_projections": torch.randn(2, flow_spec.pooled_dim, generator=generator),
        }

    noise = torch.randn(2, GRID[0] * GRID[1], flow_spec.img_dim, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    ids = torch.stack([rows, columns], -1).reshape(-1, 2).float()
    return SimpleNamespace(noise=noise, grid=GRID, ids=ids, prompt=text(), negative=text())
