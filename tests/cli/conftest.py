"""Commands in this process and in processes of their own, and a tiny checkpoint folder to run them on."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmdit_deploy
from mmdit_deploy.checkpoint import write_safetensors
from mmdit_deploy.checkpoint.weights import RandomWeights, stream_parts, weights_layout
from mmdit_deploy.graph.child import call
from mmdit_deploy.spec import ModelSpec

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Small ranges, so that verification takes half a second.
RANGES = ("--batch", "1:1:2", "--img-tokens", "4:16:48", "--txt-tokens", "1:8:16")
QUICK = (*RANGES, "--target", "ort-cpu")
TREE = Path(mmdit_deploy.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    def refused(self, status: int, *words: str) -> str:
        """Check that this is a refusal in good order; gives what it says."""
        assert self.status == status, self.err
        assert "received:" in self.err and "fix:" in self.err, self.err
        assert "Traceback" not in self.err and "bug" not in self.err
        assert self.out == ""
        for word in words:
            assert word in self.err, f"{word!r} is not in:\n{self.err}"
        return self.err


def _call(command: str, *arguments: str | Path) -> Result:
    main = importlib.import_module(f"mmdit_deploy.cli.{command}").main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(a) for a in arguments])
    return Result(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def _short_trajectories(short_trajectories: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Exports calibrate on little here: what calibration finds is tested elsewhere."""
    with short_trajectories():
        yield


@pytest.fixture
def run(
    traced_once: Callable[[], contextlib.AbstractContextManager[object]],
) -> Iterator[Callable[..., Result]]:
    """Runs a command in this process: ``run("export", "--depth", "2")``."""
    with traced_once():
        yield _call


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mmdit-optimize` works on its graph in this process: two seconds less."""
    monkeypatch.setattr("mmdit_deploy.graph.optimize.in_child", call)


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """Starts a command in a process of its own."""

    def start(command: str, *arguments: str | Path) -> subprocess.Popen[str]:
        code = (
            "import signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have had it ignored
            f"from mmdit_deploy.cli.{command} import main\n"
            "sys.exit(main())"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(TREE), "PYTHONHASHSEED": "7"},
        )

    return start


@pytest.fixture(scope="package")
def checkpoint_spec(tiny_spec: ModelSpec) -> ModelSpec:
    """The tiny model as SD3 can have it: the conditioning vector is as wide as the tokens."""
    return dataclasses.replace(tiny_spec, name="tiny-sd3", cond_dim=0)


@pytest.fixture(scope="package")
def checkpoint(checkpoint_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder ``tiny-sd3/transformer`` with fp32 weights; not to be changed."""
    spec = checkpoint_spec
    folder = tmp_path_factory.mktemp("hub") / "tiny-sd3" / "transformer"
    folder.mkdir(parents=True)
    config = {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": "0.36.0",
        "sample_size": spec.pos_base_size * spec.patch_size,
        "patch_size": spec.patch_size,
        "in_channels": spec.latent_channels,
        "num_layers": spec.depth,
        "attention_head_dim": spec.head_dim,
        "num_attention_heads": spec.num_heads,
        "joint_attention_dim": spec.txt_dim,
        "caption_projection_dim": spec.width,
        "pooled_projection_dim": spec.pooled_dim,
        "out_channels": spec.out_channels,
        "pos_embed_max_size": spec.pos_max_size,
        "qk_norm": "rms_norm",
    }
    (folder / "config.json").write_text(json.dumps(config))
    layout = weights_layout(spec, torch.float32, {"format": "pt"})
    write_safetensors(folder / WEIGHTS, layout, stream_parts(spec, RandomWeights(9), torch.float32))
    return folder


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checkpoint folder of one's own, to break."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    def edit(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})
        return self.path

    def edit_config(self, **changes: object) -> Path:
        path = self.path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return self.path


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Folder:
    """A copy of the checkpoint."""
    return Folder(Path(shutil.copytree(checkpoint, tmp_path / "hub" / "mine" / "transformer")))


@pytest.fixture(scope="package")
def exported(
    checkpoint: Path,
    traced_once: Callable[[], contextlib.AbstractContextManager[object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Result]:
    """An fp16 bundle of the checkpoint, verified, and what the command said; not to be changed."""
    out = tmp_path_factory.mktemp("dist") / "bundle"
    with traced_once():
        result = _call("export", checkpoint, "--fp16", *QUICK, "-o", out, "--json")
    assert result.status == 0, result.err
    return out, result


@pytest.fixture
def bundle(exported: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of the bundle, to break."""
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


@pytest.fixture
def dist(tmp_path: Path) -> Iterator[Path]:
    """Where a command is told to write, and must not have left anything of a failed run."""
    parent = tmp_path / "dist"
    parent.mkdir()
    yield parent
    assert not [name for name in os.listdir(parent) if name.startswith(".partial")]


@pytest.fixture
def ranges() -> tuple[str, ...]:
    """Options for small ranges."""
    return RANGES


@pytest.fixture
def quick() -> tuple[str, ...]:
    """Options for small ranges and no engine but ONNX Runtime's: nothing is built."""
    return QUICK


@pytest.fixture
def refuse(run: Callable[..., Any], dist: Path, ranges: tuple[str, ...], quick: tuple[str, ...]) -> Callable[..., str]:
    """Runs an export that must be refused: ``refuse(2, arguments, words…)``; gives what it says."""

    def call(status: int, arguments: list[str | Path], *words: str) -> str:
        options = ranges if "--target" in arguments else quick
        result = run("export", *options, *arguments, "-o", dist / "b")  # the last range given is the one
        said: str = result.refused(status, *words)
        assert os.listdir(dist) == []
        return said

    return call


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two: the pools of PyTorch and ONNX Runtime would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
