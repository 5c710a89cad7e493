"""The checkpoints that the bench makes are what diffusers makes and loads, and no block in them is idle."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmdit_deploy.checkpoint import SafetensorsFile, open_checkpoint, open_model
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.families import PRESETS, family_of, spec_from_config

diffusers = pytest.importorskip("diffusers")

TINY = ["tiny-dual", "tiny-flux1-guidance", "tiny-flux2", "tiny-qwen-image"]
B, ROWS, COLS, TXT = 2, 4, 5, 7


@pytest.mark.parametrize("name", ["tiny", "tiny-qknorm", *TINY])
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
    model = getattr(diffusers, config["_class_name"]).from_pretrained(folders[True], torch_dtype=torch.bfloat16)
    state = model.state_dict()
    assert set(state) == set(streamed.tensors)
    assert all(torch.equal(tensor, streamed.read(key)) for key, tensor in state.items())


@pytest.mark.parametrize("name", PRESETS)
def test_published_configs_are_the_presets(maker: ModuleType, name: str) -> None:
    assert spec_from_config(maker.CONFIGS[name], name) == PRESETS[name]


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux1-dev", "flux2-dev", "qwen-image"])
def test_published_configs_make_diffusers_models_of_our_keys(maker: ModuleType, name: str) -> None:
    state = maker.meta_model(maker.CONFIGS[name]).state_dict()
    spec = dataclasses.replace(PRESETS[name], pos_table=PRESETS[name].pos_max_size > 0)
    ours = {part.key: part.shape for parameter in parameters(spec) for part in parameter.parts}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == ours


def feed(model: Any, name: str) -> dict[str, Any]:
    """Random inputs, as diffusers' class takes them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    config = model.config
    inputs: dict[str, Any] = {"encoder_hidden_states": normal(B, TXT, config.joint_attention_dim)}
    if name == "tiny-dual":
        inputs["hidden_states"] = normal(B, config.in_channels, 2 * ROWS, 2 * COLS)
        inputs["timestep"] = torch.tensor([900.0, 100.0])
    else:
        inputs["hidden_states"] = normal(B, ROWS * COLS, config.in_channels)
        inputs["timestep"] = torch.tensor([0.9, 0.1])
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = normal(B, config.pooled_projection_dim)
    if name == "tiny-qwen-image":
        inputs |= {"img_shapes": [[(1, ROWS, COLS)]] * B, "encoder_hidden_states_mask": torch.ones(B, TXT).bool()}
    elif "axes_dims_rope" in config:
        axes = len(config.axes_dims_rope)
        inputs |= {"img_ids": torch.arange(ROWS * COLS)[:, None].expand(-1, axes).float()}
        inputs |= {"txt_ids": torch.zeros(TXT, axes)}
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.tensor([3.5, 2.0])
    return inputs


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("name", TINY)
def test_every_block_changes_the_output(maker: ModuleType, tmp_path: Path, name: str) -> None:
    """Without any one modulation, whose gates open the block for its tokens, the output is another."""
    assert maker.main(["--config", name, "--dtype", "fp32", "--pipeline", str(tmp_path / "pipe")]) == 0
    folder = open_checkpoint(tmp_path / "pipe").path
    assert folder.name == "transformer"
    model = getattr(diffusers, maker.CONFIGS[name]["_class_name"]).from_pretrained(folder).eval()
    inputs = feed(model, name)
    keys = family_of(spec_from_config(maker.CONFIGS[name], name)).keys
    patterns = [m.replace("*", "[0-9]+") for k in keys if "modulation" in k.path.split(".")[0] for m in k.diffusers]
    state = model.state_dict()
    modulations = [key for key in state if any(re.fullmatch(rf"{p}\.weight", key) for p in patterns)]
    assert len(modulations) == {"tiny-dual": 7, "tiny-flux1-guidance": 8, "tiny-flux2": 4, "tiny-qwen-image": 7}[name]
    with torch.no_grad():
        whole = model(**inputs, return_dict=False)[0]
        assert whole.isfinite().all() and 0.1 < whole.std() < 10
        for key in modulations:
            held = {k: state[k].clone() for k in (key, key.replace(".weight", ".bias")) if k in state}
            for k in held:
                state[k].zero_()
            part = model(**inputs, return_dict=False)[0]
            # Text reaches the image through attention alone: a hundred times what fp32 may differ by.
            least = 1e-3 if "txt" in key or "context" in key else 0.05
            assert (part - whole).norm() > least * whole.norm(), key
            for k, tensor in held.items():
                state[k].copy_(tensor)


def test_a_file_on_the_command_line(maker: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    arguments = ["--config", "tiny-flux2", "--layout", "original", "--prefix", "model.diffusion_model.", str(path)]
    assert maker.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["weight_bytes"] == path.stat().st_size and said["weights"] == "random"
    with SafetensorsFile(path) as file:
        assert all(key.startswith("model.diffusion_model.") for key in file.tensors)
        assert "model.diffusion_model.single_stream_modulation.lin.weight" in file.tensors
    assert open_model(path).spec.family == "flux2"
    with pytest.raises(SystemExit):
        maker.main(["--config", "tiny-flux2", "--layout", "original", str(tmp_path / "folder")])
    assert "OUT.safetensors" in capsys.readouterr().err
