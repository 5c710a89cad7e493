"""diffusers' own SD3 transformer, our eager model and the exported graphs compute the same, at any shape.

diffusers is the judge that nobody here wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.weights import open_weights
from mmdit_deploy.families import POSITION_TABLE
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verify.metrics import compare

diffusers = pytest.importorskip("diffusers")

MAX_REL_L2 = 1e-5  # the tolerance of fp32
CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 20,
    "out_channels": 3,
    "pos_embed_max_size": 72,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "no-qk-norm": {},
    "qk-norm": {"qk_norm": "rms_norm"},
    "dual-attention": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)},
}
# (batch, rows, cols, text tokens): one text token, one image token, odd sizes, strips, and 4096 image tokens
SHAPES = (
    (1, 8, 8, 7),
    (2, 8, 8, 1),
    (1, 1, 1, 1),
    (1, 1, 24, 5),
    (2, 24, 1, 16),
    (3, 9, 5, 2),
    (1, 5, 9, 13),
    (2, 7, 7, 77),
    (4, 3, 2, 33),
    (1, 13, 11, 64),
    (2, 16, 16, 154),
    (1, 72, 3, 8),
    (1, 64, 64, 9),
)
TIMESTEPS = (1000.0, 0.0, 999.0, 500.25)


def random_diffusers_model(config: dict[str, Any]) -> Any:
    """A `SD3Transformer2DModel` whose gates and modulations are not zero, so that every weight matters."""
    model = diffusers.SD3Transformer2DModel(**config).eval()
    for key, tensor in model.state_dict().items():
        if key != POSITION_TABLE:
            mean, std = weight_statistics(key, tuple(tensor.shape))
            tensor.copy_(random_tensor(5, key, tuple(tensor.shape), std=std, mean=mean))
    return model


def patchify(latent: Tensor) -> Tensor:
    """[B, C, 2·rows, 2·cols] → tokens [B, rows·cols, C·4], a patch in channel, row, column order."""
    patches = latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B C rows p cols q
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `patchify`."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, cols))  # B rows cols C p q
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def inputs_for(spec: ModelSpec, batch: int, rows: int, cols: int, txt_tokens: int) -> dict[str, Tensor]:
    """The contract's inputs; timesteps differ over the batch, and over the shapes."""
    sizes = {
        "hidden_states": (rows * cols, spec.img_dim),
        "encoder_hidden_states": (txt_tokens, spec.txt_dim),
    }
    features = {
        name: random_tensor(11, name, (batch, *shape), std=1.0)
        for name, shape in {**sizes, "pooled_projections": (spec.pooled_dim,)}.items()
    }
    steps = [TIMESTEPS[(rows + i) % len(TIMESTEPS)] for i in range(batch)]
    return {**features, "timestep": torch.tensor(steps), "img_ids": grid_ids(rows, cols)}


def run_diffusers(model: Any, inputs: dict[str, Tensor], rows: int, cols: int) -> Tensor:
    """diffusers' velocity, as tokens."""
    with torch.inference_mode():
        (velocity,) = model(
            hidden_states=unpatchify(inputs["hidden_states"], rows, cols),
            encoder_hidden_states=inputs["encoder_hidden_states"],
            pooled_projections=inputs["pooled_projections"],
            timestep=inputs["timestep"],
            return_dict=False,
        )
    return patchify(velocity)


def test_patchify_and_unpatchify_are_inverse() -> None:
    latent = torch.arange(2 * 3 * 4 * 10.0).reshape(2, 3, 4, 10)
    tokens = patchify(latent)
    assert tokens[0, 1, :4].tolist() == latent[0, 0, :2, 2:4].flatten().tolist()
    assert torch.equal(unpatchify(tokens, 2, 5), latent)


def assert_all_agree(
    model: Any,
    eager: MMDiT,
    folder: Path,
    dialects: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> None:
    """diffusers, the eager model and one session per graph agree at every shape."""
    spec = eager.spec
    sessions = {name: open_session(folder / name, "ort-cpu") for name in dialects}
    for batch, rows, cols, txt_tokens in shapes:
        inputs = inputs_for(spec, batch, rows, cols, txt_tokens)
        expected = run_diffusers(model, inputs, rows, cols)
        with torch.inference_mode():
            received = {"eager": eager(**inputs)}
        outputs = [("sample", torch.float32, tuple(expected.shape))]
        for name, session in sessions.items():
            received[name] = run_session(session, inputs, outputs)["sample"]
        worst = {name: compare(tensor, expected).rel_l2 for name, tensor in received.items()}
        assert max(worst.values()) <= MAX_REL_L2, (batch, rows, cols, txt_tokens, worst)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_from_one_text_token_to_4096_image_tokens(
    variant: str,
    depth: int,
    tmp_path: Path,
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    eager_model: Callable[..., MMDiT],
) -> None:
    config = {**CONFIG, **VARIANTS[variant], "num_layers": depth}
    if "dual_attention_layers" in config:
        config["dual_attention_layers"] = tuple(i for i in config["dual_attention_layers"] if i < depth)
    model = random_diffusers_model(config)
    model.save_pretrained(tmp_path / "checkpoint")
    spec, source = open_weights(tmp_path / "checkpoint")
    assert not spec.pos_table  # the formula's own table is no table of the checkpoint's own
    folder = save_graphs(tmp_path / "bundle", spec, source, graphs_of(spec))
    assert_all_agree(model, eager_model(spec, source), folder, ("model.onnx", "model.ort.onnx"))


def test_a_table_of_the_checkpoints_own_is_used(
    tmp_path: Path,
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    eager_model: Callable[..., MMDiT],
) -> None:
    model = random_diffusers_model({**CONFIG, "num_layers": 1})
    table = model.state_dict()[POSITION_TABLE]
    table += random_tensor(7, "another table", tuple(table.shape), std=0.5)
    model.save_pretrained(tmp_path / "checkpoint")
    spec, source = open_weights(tmp_path / "checkpoint")
    assert spec.pos_table
    folder = save_graphs(tmp_path / "bundle", spec, source, graphs_of(spec))
    assert_all_agree(model, eager_model(spec, source), folder, ("model.onnx", "model.ort.onnx"))


@pytest.mark.parametrize(("position", "differs"), [(None, False), (0, True), (-1, True)])
def test_one_changed_position_is_seen(tmp_path: Path, position: int | None, differs: bool) -> None:
    """A table that differs from the formula in a single value is not replaced by the formula."""
    model = random_diffusers_model({**CONFIG, "num_layers": 1})
    if position is not None:
        model.state_dict()[POSITION_TABLE][0, position, position] += 0.01
    model.save_pretrained(tmp_path)
    assert open_weights(tmp_path)[0].pos_table == differs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_rounded_to_16_bits_is_still_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_diffusers_model({**CONFIG, "num_layers": 1})
    torch.nn.Module.to(model, dtype)
    assert model.state_dict()[POSITION_TABLE].dtype == dtype
    model.save_pretrained(tmp_path)
    assert not open_weights(tmp_path)[0].pos_table


@pytest.mark.filterwarnings("ignore")  # diffusers' and accelerate's own
@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_the_weights_file_of_a_bundle(
    variant: str, tmp_path: Path, graphs_of: Callable[..., Graphs], save_graphs: Callable[..., Path]
) -> None:
    model = random_diffusers_model({**CONFIG, **VARIANTS[variant], "num_layers": 3})
    model.save_pretrained(tmp_path / "checkpoint")
    spec, source = open_weights(tmp_path / "checkpoint")
    bundle = save_graphs(tmp_path / "bundle", spec, source, graphs_of(spec))
    folder = tmp_path / "loaded"
    folder.mkdir()
    shutil.copy(bundle / "weights.safetensors", folder / "diffusion_pytorch_model.safetensors")
    shutil.copy(tmp_path / "checkpoint" / "config.json", folder / "config.json")
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    loaded = diffusers.SD3Transformer2DModel.from_pretrained(folder).eval()
    inputs = inputs_for(spec, 2, 6, 5, 9)
    assert torch.equal(run_diffusers(loaded, inputs, 6, 5), run_diffusers(model, inputs, 6, 5))
