"""diffusers' FLUX.1, FLUX.2, Qwen-Image and SD3-with-ControlNet compute what our eager model and graphs compute.

diffusers is the judge that nobody here wrote. Each family at shapes that its users have: not square, odd, one text
token, several reference images, masks with holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.weights import open_weights
from mmdit_deploy.contract import Contract
from mmdit_deploy.families import POSITION_TABLE, family_of, position_ids
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.model import MMDiT
from mmdit_deploy.runtime import open_session, run_session
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify.metrics import compare

diffusers = pytest.importorskip("diffusers")

MAX_REL_L2 = 1e-5  # the tolerance of fp32
_SMALL = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24}
_FLUX1 = {**_SMALL, "in_channels": 12, "pooled_projection_dim": 20, "axes_dims_rope": (4, 14, 14)}
_FLUX2 = {**_SMALL, "in_channels": 12, "axes_dims_rope": (8, 8, 8, 8)}
_QWEN = {**_SMALL, "in_channels": 12, "out_channels": 3, "axes_dims_rope": (4, 14, 14)}
_SD3 = {
    **_SMALL,
    "sample_size": 32,
    "in_channels": 4,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 20,
    "out_channels": 3,
    "pos_embed_max_size": 72,
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class Variant:
    """A tiny model of one of diffusers' classes.

    Args:
        residuals: of a ControlNet, stacked.
    """

    class_name: str
    config: dict[str, Any]
    residuals: int = 0


VARIANTS = {
    "flux1-guidance": Variant(
        "FluxTransformer2DModel", {**_FLUX1, "num_layers": 2, "num_single_layers": 3, "guidance_embeds": True}
    ),
    "flux1-schnell": Variant("FluxTransformer2DModel", {**_FLUX1, "num_layers": 1, "num_single_layers": 1}),
    "flux1-out-channels": Variant(
        "FluxTransformer2DModel", {**_FLUX1, "num_layers": 1, "num_single_layers": 2, "out_channels": 5}
    ),
    "flux2-dev": Variant("Flux2Transformer2DModel", {**_FLUX2, "num_layers": 2, "num_single_layers": 3}),
    "flux2-klein": Variant(
        "Flux2Transformer2DModel",
        {**_FLUX2, "num_layers": 1, "num_single_layers": 2, "guidance_embeds": False, "mlp_ratio": 2.0},
    ),
    "qwen-image": Variant("QwenImageTransformer2DModel", {**_QWEN, "num_layers": 3}),
    "qwen-image-one-block": Variant("QwenImageTransformer2DModel", {**_QWEN, "num_layers": 1}),
    "qwen-image-edit-2511": Variant("QwenImageTransformer2DModel", {**_QWEN, "num_layers": 2, "zero_cond_t": True}),
    "sd3-one-residual": Variant("SD3Transformer2DModel", {**_SD3, "num_layers": 3}, residuals=1),
    "sd3-residuals": Variant("SD3Transformer2DModel", {**_SD3, "num_layers": 5}, residuals=2),
    "sd3.5-medium-residuals": Variant(
        "SD3Transformer2DModel", {**_SD3, "num_layers": 4, "dual_attention_layers": (0, 1)}, residuals=4
    ),
}
# (batch, images: the one that is made and its references, text tokens)
SHAPES: tuple[tuple[int, list[tuple[int, int]], int], ...] = (
    (1, [(8, 8)], 7),
    (2, [(8, 8)], 1),
    (1, [(1, 1)], 1),
    (2, [(24, 1)], 16),
    (3, [(5, 9)], 2),
    (1, [(13, 11)], 64),
    (2, [(1, 24)], 5),
    (1, [(31, 33)], 9),
    (2, [(6, 5), (3, 8)], 12),
    (1, [(4, 7), (2, 3), (5, 1), (1, 1)], 1),
)


def random_diffusers_model(variant: Variant) -> Any:
    """One whose gates and modulations are not zero, so that every weight matters."""
    model = getattr(diffusers, variant.class_name)(**variant.config).eval()
    for key, tensor in model.state_dict().items():
        if key != POSITION_TABLE:
            mean, std = weight_statistics(key, tuple(tensor.shape))
            tensor.copy_(random_tensor(5, key, tuple(tensor.shape), std=std, mean=mean))
    return model


def inputs_for(spec: ModelSpec, batch: int, images: list[tuple[int, int]], txt_tokens: int) -> dict[str, Tensor]:
    """The contract's inputs; timesteps and guidance differ over the batch, masks have holes."""
    tokens = sum(rows * cols for rows, cols in images)
    sizes = {"batch": batch, "img_tokens": tokens, "txt_tokens": txt_tokens}
    img_ids, txt_ids = (torch.from_numpy(ids) for ids in position_ids(spec, images, txt_tokens))
    steps = torch.tensor([999.0, 500.25, 3.0])[:batch]
    known = {"img_ids": img_ids, "txt_ids": txt_ids, "timestep": steps / spec.time_scale, "guidance": 1 + steps / 300}
    inputs = {}
    for tensor in Contract.of(spec, PRECISIONS["fp32"]).inputs:
        random = random_tensor(11, f"{tensor.name} {txt_tokens}", tensor.shape(sizes), std=1.0)
        inputs[tensor.name] = known.get(tensor.name, random > -0.5 if tensor.dtype == "bool" else random)
    return inputs


def run_diffusers(model: Any, inputs: dict[str, Tensor], spec: ModelSpec, images: list[tuple[int, int]]) -> Tensor:
    """What diffusers' class makes of the same inputs, in its own terms."""
    arguments: dict[str, Any] = dict(inputs)
    residuals = arguments.pop("block_controlnet_hidden_states", None)
    if residuals is not None:
        arguments["block_controlnet_hidden_states"] = list(residuals)
    if spec.family == "qwen-image":
        del arguments["img_ids"], arguments["txt_ids"]
        arguments["img_shapes"] = [[(1, rows, cols) for rows, cols in images]] * len(inputs["timestep"])
    if spec.family == "sd3":
        ((rows, cols),) = images
        del arguments["img_ids"]
        tokens, patch = arguments["hidden_states"], spec.patch_size
        grid = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, cols))
        arguments["hidden_states"] = grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    with torch.inference_mode():
        (sample,) = model(**arguments, return_dict=False)
    if spec.family == "sd3":
        patches = sample.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        sample = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return sample  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*`torch_dtype`")
@pytest.mark.parametrize("name", VARIANTS)
def test_parity(
    name: str,
    tmp_path: Path,
    graphs_of: Callable[..., Graphs],
    save_graphs: Callable[..., Path],
    eager_model: Callable[..., MMDiT],
) -> None:
    variant = VARIANTS[name]
    model = random_diffusers_model(variant)
    model.save_pretrained(tmp_path / "checkpoint")
    spec, source = open_weights(tmp_path / "checkpoint")
    spec = dataclasses.replace(spec, residuals=variant.residuals)
    folder = save_graphs(tmp_path / "bundle", spec, source, graphs_of(spec))
    sessions = {file: open_session(folder / file, "ort-cpu") for file in ("model.onnx", "model.ort.onnx")}
    eager = eager_model(spec, source)
    shapes = [shape for shape in SHAPES if len(shape[1]) == 1 or family_of(spec).references]
    assert len(shapes) >= 8
    for batch, images, txt_tokens in shapes:
        inputs = inputs_for(spec, batch, images, txt_tokens)
        expected = run_diffusers(model, inputs, spec, images)
        with torch.inference_mode():
            received: dict[str, Any] = {"eager": eager(**inputs)}
        for file, session in sessions.items():
            outputs = [("sample", torch.float32, tuple(expected.shape))]
            received[file] = run_session(session, inputs, outputs)["sample"]
        worst = {by: compare(tensor, expected).rel_l2 for by, tensor in received.items()}
        assert max(worst.values()) <= MAX_REL_L2, (batch, images, txt_tokens, worst)


@pytest.mark.parametrize("name", ["flux1-guidance", "flux2-dev", "qwen-image"])
def test_every_input_matters(name: str, tmp_path: Path, eager_model: Callable[..., MMDiT]) -> None:
    """A comparison that an input cannot change would prove nothing about it."""
    random_diffusers_model(VARIANTS[name]).save_pretrained(tmp_path)
    spec, source = open_weights(tmp_path)
    eager = eager_model(spec, source)
    inputs = inputs_for(spec, 2, [(4, 5), (3, 2)], 6)
    with torch.inference_mode():
        expected = eager(**inputs)
        for key, tensor in inputs.items():
            changed = ~tensor if tensor.dtype == torch.bool else tensor.roll(1, 0)
            if key == "txt_ids" and not tensor.any():
                changed = tensor + 1  # FLUX.1's text is all at the origin
            assert compare(eager(**{**inputs, key: changed}), expected).rel_l2 > 1e-3, key
