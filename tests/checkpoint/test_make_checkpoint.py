"""The checkpoints that the bench makes are what diffusers makes and loads, and no block in them is idle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmdit_deploy.checkpoint import open_checkpoint

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tiny", "tiny-qknorm", "tiny-dual"])
def test_streamed_and_saved_by_diffusers_are_the_same(maker: ModuleType, tmp_path: Path, name: str) -> None:
    config = maker.CONFIGS[name]
    folders = {stream: tmp_path / str(stream) for stream in (False, True)}
    for stream, folder in folders.items():
        maker.make_checkpoint(config, folder, dtype=torch.bfloat16, shard_bytes=3e5, stream=stream)
    saved, streamed = (open_checkpoint(folder) for folder in folders.values())
    assert len(saved.files) > 1 and len(streamed.files) > 1
    assert saved.config == streamed.config and set(saved.tensors) == set(streamed.tensors)
    for key in saved.tensors:
        assert torch.equal(saved.read(key), streamed.read(key)), key
    model = diffusers.SD3Transformer2DModel.from_pretrained(folders[True], torch_dtype=torch.bfloat16)
    state = model.state_dict()
    assert set(state) == set(streamed.tensors)
    assert all(torch.equal(tensor, streamed.read(key)) for key, tensor in state.items())


def test_every_block_changes_the_output(maker: ModuleType, tmp_path: Path) -> None:
    assert maker.main(["--config", "tiny-dual", "--dtype", "fp32", "--pipeline", str(tmp_path / "pipe")]) == 0
    assert open_checkpoint(tmp_path / "pipe").path.name == "transformer"
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "pipe" / "transformer").eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "pooled_projections": torch.randn(2, 48, generator=generator),
        "timestep": torch.tensor([900.0, 100.0]),
    }
    with torch.no_grad():
        whole = model(**inputs, return_dict=False)[0]
        assert whole.isfinite().all() and 0.1 < whole.std() < 10
        for index in range(len(model.transformer_blocks) - 1):  # the last block gives no text, it cannot be skipped
            part = model(**inputs, skip_layers=[index], return_dict=False)[0]
            assert (part - whole).norm() > 0.05 * whole.norm()
