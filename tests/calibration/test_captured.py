"""Inputs captured from somebody's own diffusers pipeline are what the transformer computed with; a file is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit_deploy.calibration import captured as captured_module
from mmdit_deploy.calibration.capture import capture
from mmdit_deploy.calibration.captured import FORMAT, calibrate_captured, read_captured
from mmdit_deploy.calibration.observe import Observer
from mmdit_deploy.calibration.trajectory import default_samples
from mmdit_deploy.checkpoint import random_tensor, weight_statistics
from mmdit_deploy.checkpoint.weights import RandomWeights, open_weights
from mmdit_deploy.errors import CheckpointError, UsageError
from mmdit_deploy.families import POSITION_TABLE
from mmdit_deploy.model import MMDiT
from mmdit_deploy.sampling import patchify
from mmdit_deploy.spec import ModelSpec

_SMALL = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24, "num_layers": 2}
_FLUX = {**_SMALL, "in_channels": 12, "num_single_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        **_SMALL, "sample_size": 32, "in_channels": 4, "caption_projection_dim": 64, "pooled_projection_dim": 20,
        "out_channels": 3, "pos_embed_max_size": 24, "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {
        **_FLUX, "pooled_projection_dim": 20, "axes_dims_rope": (4, 14, 14), "guidance_embeds": True
    },
    "Flux2Transformer2DModel": {**_FLUX, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False},
    "QwenImageTransformer2DModel": {**_SMALL, "in_channels": 12, "out_channels": 3, "axes_dims_rope": (4, 14, 14)},
}  # fmt: skip


def transformer(name: str) -> Any:
    """One of diffusers' classes whose gates and modulations are not zero."""
    diffusers = pytest.importorskip("diffusers")
    model = getattr(diffusers, name)(**CONFIGS[name]).eval()
    for key, tensor in model.state_dict().items():
        if key != POSITION_TABLE:
            mean, std = weight_statistics(key, tuple(tensor.shape))
            tensor.copy_(random_tensor(5, key, tuple(tensor.shape), std=std, mean=mean))
    return model


def arguments(name: str) -> dict[str, Any]:
    """What diffusers' pipelines pass: a batch of two, and for editing models a reference image."""

    def values(key: str, *shape: int) -> Tensor:
        return random_tensor(9, key, shape, std=1.0)

    text = {"encoder_hidden_states": values("text", 2, 5, 24)}
    if name == "SD3Transformer2DModel":
        steps = torch.tensor([750.0, 750.0])
        return {
            **text,
            "hidden_states": values("latent", 2, 4, 6, 8),
            "timestep": steps,
            "pooled_projections": values("pooled", 2, 20),
        }
    shared = {**text, "hidden_states": values("tokens", 2, 3 * 4 + 2 * 2, 12), "timestep": torch.tensor([0.75, 0.75])}
    if name == "QwenImageTransformer2DModel":
        mask = torch.ones(2, 5, dtype=torch.int64)
        mask[1, 3:] = 0
        return {**shared, "encoder_hidden_states_mask": mask, "img_shapes": [[(1, 3, 4), (1, 2, 2)]] * 2}
    axes = 3 if name == "FluxTransformer2DModel" else 4
    rows = [[0, r, c, 0][:axes] for r in range(3) for c in range(4)] + [
        [1, r, c, 0][:axes] for r in range(2) for c in range(2)
    ]
    ids = {"img_ids": torch.tensor(rows).float(), "txt_ids": torch.zeros(5, axes)}
    if axes == 4:  # as a batch, in whole numbers
        return {**shared, **{key: value.long()[None].repeat(2, 1, 1) for key, value in ids.items()}}
    return {**shared, **ids, "pooled_projections": values("pooled", 2, 20), "guidance": torch.tensor([3.5, 4.5])}


@pytest.mark.filterwarnings("ignore:.*`torch_dtype`")
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_inputs_give_the_transformers_own_output(
    name: str, tmp_path: Path, eager_model: Callable[..., MMDiT]
) -> None:
    model, given = transformer(name), arguments(name)
    with (
        capture(SimpleNamespace(transformer=model), tmp_path / "captured.safetensors") as samples,
        torch.inference_mode(),
    ):
        (expected,) = model(**given, return_dict=False)
        model(**{**given, "timestep": given["timestep"] / 2})
    assert len(samples) == 2
    model(**given)  # afterwards nothing is captured
    assert len(samples) == 2

    model.save_pretrained(tmp_path / "checkpoint")
    spec, source = open_weights(tmp_path / "checkpoint")
    captured = read_captured(tmp_path / "captured.safetensors", spec)
    assert captured.names == ("0000", "0001")
    first, second = map(captured.sample, captured.names)
    assert torch.equal(first["timestep"], 2 * second["timestep"])
    with torch.inference_mode():
        received = eager_model(spec, source)(**first)
    tokens = patchify(expected, spec.patch_size) if name == "SD3Transformer2DModel" else expected
    assert torch.allclose(received, tokens, rtol=1e-4, atol=1e-5)


def test_a_controlnets_residuals_are_captured(tmp_path: Path) -> None:
    model, given = transformer("SD3Transformer2DModel"), arguments("SD3Transformer2DModel")
    residuals = [random_tensor(1, str(i), (2, 12, 64), std=1.0) for i in range(2)]
    with capture(model, tmp_path / "c", every=2) as samples:
        for _ in range(3):
            model(**given, block_controlnet_hidden_states=residuals)
    assert len(samples) == 2
    assert torch.equal(samples[0]["block_controlnet_hidden_states"], torch.stack(residuals))


def test_what_our_model_has_no_input_for_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    model, given = transformer("FluxTransformer2DModel"), arguments("FluxTransformer2DModel")
    for extra in (
        {"controlnet_block_samples": [torch.zeros(2, 16, 64)]},
        {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}},
    ):
        with (
            pytest.raises(UsageError, match=next(iter(extra))),
            capture(model, tmp_path / "captured"),
        ):
            model(**given, **extra)
    with pytest.raises(UsageError, match="no call"), capture(model, tmp_path / "captured"):
        pass
    with pytest.raises(UsageError, match="received: Linear"), capture(torch.nn.Linear(1, 1), tmp_path / "captured"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sound(tiny_models: Mapping[str, ModelSpec]) -> dict[str, Tensor]:
    """Two samples of Qwen-Image, as somebody may write them: the one in bf16, the other in fp32."""
    samples = default_samples(tiny_models["qwen-image-edit-2511"], 1, sizes=((3, 4, 5), (4, 2, 7)))
    features = ("hidden_states", "encoder_hidden_states")
    return {
        f"prompt.{i}.{name}": t.bfloat16() if name in features and i == 0 else t.clone()
        for i, sample in enumerate(samples)
        for name, t in sample.inputs.items()
    }


METADATA = {"format": FORMAT, "family": "qwen-image"}


def test_statistics_of_a_file_are_those_of_its_samples(
    tmp_path: Path, sound: dict[str, Tensor], tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> None:
    spec, source = tiny_models["qwen-image-edit-2511"], RandomWeights(5)
    save_file(sound, tmp_path / "file", METADATA)
    captured = read_captured(tmp_path / "file", spec)
    assert set(captured.names) == {"prompt.0", "prompt.1"}
    observer = Observer(spec, source, torch.float32, programs=programs_for(spec))
    observer.evaluate([captured.sample(name) for name in captured.names])
    for room in (2**40, 0):  # all samples together, and one at a time
        with mock.patch.object(captured_module, "available_memory", lambda room=room: room):
            seen = calibrate_captured(spec, source, captured, torch.float32, programs=programs_for(spec))
        for path, expected in observer.statistics.linears.items():
            assert torch.equal(seen.linears[path].histogram, expected.histogram)
            assert torch.equal(seen.linears[path].channels, expected.channels)
        assert seen.attentions == observer.statistics.attentions
        for call, ranges in observer.statistics.values.items():
            assert {n: (r.amax, r.rms) for n, r in seen.values[call].items()} == {
                n: (r.amax, r.rms) for n, r in ranges.items()
            }


def _change(key: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value

    return change


BROKEN: dict[str, Callable[[dict[str, Tensor]], None]] = {
    r"missing \['timestep'\]": _change("prompt.0.timestep", None),
    r"unknown \['guidance'\]": _change("prompt.0.guidance", torch.ones(2)),
    "<sample>.<input>": _change("timestep", torch.ones(2)),
    r"shape \[2, 12, 5\]": _change("prompt.0.hidden_states", torch.ones(2, 12, 5)),
    "batch is one size": _change("prompt.0.timestep", torch.ones(3)),
    "timestep is float32": _change("prompt.0.timestep", torch.ones(2, dtype=torch.bfloat16)),
    "mask is bool": _change("prompt.0.encoder_hidden_states_mask", torch.ones(2, 5)),
    "hidden_states is float": _change("prompt.0.hidden_states", torch.ones(2, 12, 12, dtype=torch.float64)),
    "1 NaN and 0 Inf in 'prompt.1.img_ids'": _change("prompt.1.img_ids", torch.ones(8, 3)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_that_does_not_fit_is_refused(
    message: str, tmp_path: Path, sound: dict[str, Tensor], tiny_models: Mapping[str, ModelSpec]
) -> None:
    tensors = dict(sound)
    BROKEN[message](tensors)
    if "NaN" in message:
        tensors["prompt.1.img_ids"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "file", METADATA)
    with pytest.raises(UsageError, match=message) as error:
        read_captured(tmp_path / "file", tiny_models["qwen-image-edit-2511"])
    assert str(tmp_path / "file") in str(error.value) and "fix: " in str(error.value)


def test_a_file_of_another_format_or_family_is_refused(
    tmp_path: Path, sound: dict[str, Tensor], tiny_models: Mapping[str, ModelSpec]
) -> None:
    spec = tiny_models["qwen-image-edit-2511"]
    for metadata, message in (
        (None, "format"),
        ({**METADATA, "format": "something 2"}, "something 2"),
        ({**METADATA, "family": "flux1"}, "'flux1'"),
    ):
        save_file(sound, tmp_path / "file", metadata)
        with pytest.raises(UsageError, match=message):
            read_captured(tmp_path / "file", spec)
    save_file({}, tmp_path / "file", METADATA)
    with pytest.raises(UsageError, match="no tensors"):
        read_captured(tmp_path / "file", spec)
    (tmp_path / "pickle").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="zip archive"):
        read_captured(tmp_path / "pickle", spec)
    assert load_file(tmp_path / "file") == {}
