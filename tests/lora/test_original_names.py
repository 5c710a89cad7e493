"""Names of the original layouts, with dots and with kohya's underscores: fused projections, alphas, swapped halves.

The FLUX families' are judged by diffusers' own converters, as far as they go at a tiny width; all of them by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.lora import open_lora

ALPHA, RANK, WIDTH = 3.0, 6, 64
D, S, J = "transformer_blocks.0", "single_transformer_blocks.1", "joint_blocks.0"
QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

# By family: the original's module, and the modules of diffusers that it is, in order.
FUSED: dict[str, dict[str, list[str]]] = {
    "sd3": {
        f"{J}.x_block.attn.qkv": [f"{D}.attn.{n}" for n in QKV],
        f"{J}.x_block.attn2.qkv": [f"{D}.attn2.{n}" for n in QKV],
        f"{J}.context_block.attn.qkv": [f"{D}.attn.{n}" for n in ADDED],
        f"{J}.x_block.attn.proj": [f"{D}.attn.to_out.0"],
        f"{J}.x_block.mlp.fc1": [f"{D}.ff.net.0.proj"],
        f"{J}.context_block.mlp.fc2": [f"{D}.ff_context.net.2"],
        f"{J}.context_block.adaLN_modulation.1": [f"{D}.norm1_context.linear"],
        "context_embedder": ["context_embedder"],
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "final_layer.linear": ["proj_out"],
    },
    "flux1": {
        "double_blocks.0.img_attn.qkv": [f"{D}.attn.{n}" for n in QKV],
        "double_blocks.0.txt_attn.qkv": [f"{D}.attn.{n}" for n in ADDED],
        "double_blocks.0.txt_attn.proj": [f"{D}.attn.to_add_out"],
        "double_blocks.0.img_mlp.2": [f"{D}.ff.net.2"],
        "double_blocks.0.txt_mod.lin": [f"{D}.norm1_context.linear"],
        "single_blocks.1.linear2": [f"{S}.proj_out"],
        "single_blocks.1.modulation.lin": [f"{S}.norm.linear"],
        "single_blocks.1.linear1": [*(f"{S}.attn.{n}" for n in QKV), f"{S}.proj_mlp"],
        "img_in": ["x_embedder"],
        "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
        "final_layer.linear": ["proj_out"],
    },
    "flux2": {
        "double_blocks.0.img_attn.qkv": [f"{D}.attn.{n}" for n in QKV],
        "double_blocks.0.txt_attn.qkv": [f"{D}.attn.{n}" for n in ADDED],
        "double_blocks.0.img_attn.proj": [f"{D}.attn.to_out.0"],
        "double_blocks.0.txt_mlp.0": [f"{D}.ff_context.linear_in"],
        "single_blocks.1.linear1": [f"{S}.attn.to_qkv_mlp_proj"],
        "single_blocks.1.linear2": [f"{S}.attn.to_out"],
        "img_in": ["x_embedder"],
        "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    },
    # Its original layout is diffusers'.
    "qwen-image": {
        name: [name]
        for name in (f"{D}.attn.to_q", f"{D}.attn.add_q_proj", f"{D}.attn.to_out.0", f"{D}.img_mlp.net.0.proj",
                     f"{D}.txt_mlp.net.2", f"{D}.img_mod.1", "img_in", "norm_out.linear", "proj_out")
    },
}  # fmt: skip
SWAPPED = {
    "sd3": {
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "joint_blocks.1.context_block.adaLN_modulation.1": "transformer_blocks.1.norm1_context.linear",
    },
    "flux1": {"final_layer.adaLN_modulation.1": "norm_out.linear"},
    "flux2": {"final_layer.adaLN_modulation.1": "norm_out.linear"},
}


@pytest.fixture
def fused_pair(make_pair: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """``fused_pair(it, key, modules, …)``: factors of one module that is several of diffusers'."""

    def make(it: Any, key: str, modules: list[str], **names: str) -> dict[str, Tensor]:
        shapes = [it.shape(module) for module in modules]
        inner = torch.Size(shapes[0][1:]).numel()
        return make_pair(key, sum(shape[0] for shape in shapes), inner, RANK, **names)

    return make


def by_hand(it: Any, tensors: dict[str, Tensor], names: dict[str, list[str]], scale: float) -> dict[str, Tensor]:
    """Merged weights; ``names`` says what module of diffusers each module of the file is."""
    state = dict(it.model.state_dict())
    for name, modules in names.items():
        down, up = (next(t for k, t in tensors.items() if k.startswith(f"{name}.") and f in k) for f in ("down", "up"))
        parts = (up.double() @ down.double() * scale).split([it.shape(m)[0] for m in modules])
        for module, delta in zip(modules, parts, strict=True):
            key = f"{module}.weight"
            state[key] = (state[key].double() + delta.view(state[key].shape)).float()
    return state


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_modules_by_hand(
    tiny: Callable[[str], Any], fused_pair: Callable[..., Any], write: Callable[..., Path], family: str, style: str
) -> None:
    it = tiny(family)
    tensors: dict[str, Tensor] = {}
    names = {}
    for name, modules in FUSED[family].items():
        key = f"diffusion_model.{name}" if style == "comfyui" else f"lora_unet_{name.replace('.', '_')}"
        tensors |= fused_pair(it, key, modules, down="lora_down", up="lora_up")
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        names[key] = modules
    path = write({**tensors, "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)})
    lora = open_lora(path, it.spec)
    assert lora.alphas == (ALPHA,) and lora.ranks == (RANK,) and len(lora.ignored) == 1
    touched = {f"{module}.weight" for modules in names.values() for module in modules}
    it.agree(it.merged((path, 0.5)), by_hand(it, tensors, names, 0.5 * ALPHA / RANK), touched)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, of in SWAPPED.items() for name in of])
def test_halves_that_the_original_swaps(
    tiny: Callable[[str], Any], fused_pair: Callable[..., Any], write: Callable[..., Path], family: str, name: str
) -> None:
    """The original stores shift before scale; diffusers, and we, scale before shift."""
    it, module = tiny(family), SWAPPED[family][name]
    tensors = fused_pair(it, f"diffusion_model.{name}", [module])
    down, up = (tensors[f"diffusion_model.{name}.lora_{f}.weight"] for f in "AB")
    shift, scale = (up @ down).chunk(2)
    key = f"{module}.weight"
    theirs = dict(it.model.state_dict())
    theirs[key] = theirs[key] + torch.cat([scale, shift])
    it.agree(it.merged((write(tensors), 1.0)), theirs, {key})


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_diffusers_converts_kohyas_names_alike(
    tiny: Callable[[str], Any],
    fused_pair: Callable[..., Any],
    write: Callable[..., Path],
    family: str,
) -> None:
    pytest.importorskip("peft")
    from diffusers.loaders import lora_conversion_utils as converters

    convert = getattr(converters, f"_convert_kohya_{family.replace('1', '')}_lora_to_diffusers")
    it = tiny(family)
    # Outside blocks FLUX.1's converter forgets the prefix "transformer.", and for linear1 it assumes 3072 channels.
    blocks = [name for name in FUSED[family] if "_blocks." in name and name != "single_blocks.1.linear1"]
    tensors: dict[str, Tensor] = {}
    for name in blocks:
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= fused_pair(it, key, FUSED[family][name], down="lora_down", up="lora_up")
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    converted = convert(dict(tensors))
    theirs = dict(it.model.state_dict())
    for key, down in converted.items():
        if ".lora_A." in key:
            weight = key.replace(".lora_A.weight", ".weight").removeprefix("transformer.")
            theirs[weight] = theirs[weight] + converted[key.replace("lora_A", "lora_B")] @ down
    touched = {f"{module}.weight" for name in blocks for module in FUSED[family][name]}
    it.agree(it.merged((write(tensors), 1.0)), theirs, touched)


def test_xlabs_names_of_processors(
    tiny: Callable[[str], Any], fused_pair: Callable[..., Any], write: Callable[..., Path]
) -> None:
    pytest.importorskip("peft")
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers as convert

    it = tiny("flux1")
    modules = {
        "double_blocks.0.processor.qkv_lora1": [f"{D}.attn.{n}" for n in QKV],
        "double_blocks.0.processor.qkv_lora2": [f"{D}.attn.{n}" for n in ADDED],
        "double_blocks.0.processor.proj_lora1": [f"{D}.attn.to_out.0"],
        "double_blocks.0.processor.proj_lora2": [f"{D}.attn.to_add_out"],
        "single_blocks.1.processor.qkv_lora": [f"{S}.attn.{n}" for n in QKV],
        "single_blocks.1.processor.proj_lora": [f"{S}.proj_out"],
    }
    tensors: dict[str, Tensor] = {}
    for name, parts in modules.items():
        tensors |= fused_pair(it, name, parts, down="down", up="up")
    theirs = dict(it.model.state_dict())
    converted = convert(dict(tensors))
    for key, down in converted.items():
        if ".lora_A." in key:
            weight = key.replace(".lora_A.weight", ".weight").removeprefix("transformer.")
            theirs[weight] = theirs[weight] + converted[key.replace("lora_A", "lora_B")] @ down
    touched = {f"{part}.weight" for parts in modules.values() for part in parts}
    it.agree(it.merged((write(tensors), 1.0)), theirs, touched)


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_"])
def test_underscores_of_diffusers_names(
    tiny: Callable[[str], Any], fused_pair: Callable[..., Any], write: Callable[..., Path], prefix: str
) -> None:
    it, module = tiny("sd3"), "transformer_blocks.1.attn.add_k_proj"
    key = prefix + module.replace(".", "_")
    tensors = fused_pair(it, key, [module], down="lora_down", up="lora_up")
    theirs = by_hand(it, tensors, {key: [module]}, 1.0)
    it.agree(it.merged((write(tensors), 1.0)), theirs, {f"{module}.weight"})


def test_to_out_without_its_index(
    tiny: Callable[[str], Any], fused_pair: Callable[..., Any], write: Callable[..., Path]
) -> None:
    it, module = tiny("qwen-image"), f"{D}.attn.to_out.0"
    key = f"transformer.{module.removesuffix('.0')}"
    tensors = fused_pair(it, key, [module], down="lora_down", up="lora_up")
    theirs = by_hand(it, tensors, {key: [module]}, 1.0)
    it.agree(it.merged((write(tensors), 1.0)), theirs, {f"{module}.weight"})


def test_whole_differences(
    tiny: Callable[[str], Any], make_factor: Callable[..., Tensor], write: Callable[..., Path]
) -> None:
    """ComfyUI's ``diff`` and ``diff_b``: added as they are, also to a fused module and to a norm."""
    it = tiny("flux1")
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.qkv.diff": make_factor("w", 3 * WIDTH, WIDTH),
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": make_factor("b", 3 * WIDTH),
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": make_factor("n", WIDTH // 4),
    }
    theirs = dict(it.model.state_dict())
    for leaf, whole in zip(("weight", "bias"), tensors.values(), strict=False):
        for module, rows in zip(QKV, whole.chunk(3), strict=True):
            theirs[f"{D}.attn.{module}.{leaf}"] = theirs[f"{D}.attn.{module}.{leaf}"] + 0.25 * rows
    norm = f"{D}.attn.norm_q.weight"
    theirs[norm] = theirs[norm] + 0.25 * list(tensors.values())[2]
    touched = {norm, *(f"{D}.attn.{module}.{leaf}" for module in QKV for leaf in ("weight", "bias"))}
    path = write(tensors)
    it.agree(it.merged((path, 0.25)), theirs, touched)
    assert open_lora(path, it.spec).to_json()["ranks"] == []
