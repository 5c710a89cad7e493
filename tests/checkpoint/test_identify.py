"""A file's family and layout are told by its keys and shapes, never by its name; what is none of ours is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from mmdit_deploy.checkpoint import TensorInfo
from mmdit_deploy.checkpoint.identify import Identity, identify
from mmdit_deploy.checkpoint.infer import assumed, infer_spec, recognized
from mmdit_deploy.checkpoint.key_tables import KEY_TABLES, KeyLayout
from mmdit_deploy.checkpoint.keys import Parameter, parameters
from mmdit_deploy.checkpoint.original_layout import stored_parts
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import FAMILIES, POSITION_TABLE, PRESETS
from mmdit_deploy.families.qwen_image import STILL_REFERENCES
from mmdit_deploy.spec import ModelSpec

PREFIX = "model.diffusion_model."
LAYOUTS: tuple[KeyLayout, ...] = ("diffusers", "original")
TINY = {
    name: dataclasses.replace(family.presets[-1], depth=2, single_depth=min(2, family.presets[-1].single_depth),
                              dual_attention_blocks=())
    for name, family in FAMILIES.items()
}  # fmt: skip


def infos(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, TensorInfo]:
    """What a file's header would say; nothing but keys and shapes is looked at."""
    return {
        prefix + key: TensorInfo(prefix + key, torch.float16, shape, 0, 2 * torch.Size(shape).numel())
        for key, shape in shapes.items()
    }


@functools.cache
def table_of(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every tensor of a checkpoint, the position table too."""
    return parameters(dataclasses.replace(spec, name="", pos_table=spec.pos_max_size > 0))


def shapes_of(spec: ModelSpec, layout: KeyLayout) -> dict[str, tuple[int, ...]]:
    shapes = {part.key: part.shape for p in table_of(spec) for part in stored_parts(p, layout)}
    return shapes | ({STILL_REFERENCES: (0,)} if spec.still_references else {})


def inferred(identity: Identity, tensors: dict[str, TensorInfo], name: str = "it") -> ModelSpec:
    shapes = {key: tensors[in_file].shape for key, in_file in identity.names.items()}
    return infer_spec(identity.table, shapes, where="file", name=name)


def refusal(keys: dict[str, tuple[int, ...]] | list[str], prefix: str = "") -> str:
    shapes = keys if isinstance(keys, dict) else dict.fromkeys(keys, (4, 4))
    with pytest.raises(CheckpointError) as caught:
        identify(infos(shapes, prefix), "file")
    assert caught.value.received and caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRESETS)
def test_published_models_are_told_at_their_real_size(name: str, layout: KeyLayout, prefix: str) -> None:
    """Every field of the spec but the name, from keys and shapes alone."""
    spec = PRESETS[name]
    tensors = infos(shapes_of(spec, layout), prefix)
    identity = identify(tensors, "file")
    assert identity.table.family.name == spec.family and not identity.ignored
    assert identity.table.layout == ("diffusers" if spec.family == "qwen-image" else layout)
    found = inferred(identity, tensors)
    assert dataclasses.replace(found, name=name) == spec
    assert name in recognized(found, identity.table)
    notes = assumed(found, shapes_of(spec, layout))
    assert len(notes) == (name in ("qwen-image", "qwen-image-edit")) and all("-2511" in note for note in notes)


def test_the_tell_tale_keys_of_published_files() -> None:
    """As their publishers' files have them, not as our tables say."""
    for name, key in [
        ("sd3-medium", "joint_blocks.23.context_block.adaLN_modulation.1.bias"),
        ("sd3-medium", "pos_embed"),
        ("sd3.5-large", "joint_blocks.37.context_block.attn.ln_k.weight"),
        ("sd3.5-medium", "joint_blocks.12.x_block.attn2.qkv.weight"),
        ("sd3.5-medium", "joint_blocks.0.x_block.attn2.ln_q.weight"),
        ("flux1-dev", "double_blocks.18.img_attn.norm.key_norm.scale"),
        ("flux1-dev", "single_blocks.37.modulation.lin.weight"),
        ("flux1-dev", "guidance_in.out_layer.bias"),
        ("flux2-dev", "single_stream_modulation.lin.weight"),
        ("flux2-dev", "double_blocks.7.txt_mlp.2.weight"),
        ("flux2-klein-4b", "double_stream_modulation_txt.lin.weight"),
    ]:
        assert key in shapes_of(PRESETS[name], "original"), (name, key)
    assert len(shapes_of(PRESETS["flux1-dev"], "original")) == 780
    assert "guidance_in.in_layer.weight" not in shapes_of(PRESETS["flux1-schnell"], "original")
    assert "transformer_blocks.59.img_mod.1.weight" in shapes_of(PRESETS["qwen-image"], "original")


def test_other_components_are_named_and_ignored() -> None:
    """ComfyUI's all-in-one files: text encoders and VAE beside the transformer."""
    others = {
        "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": (768,),
        "text_encoders.clip_l.logit_scale": (),
        "text_encoders.t5xxl.transformer.shared.weight": (100, 64),
        "vae.encoder.conv_in.weight": (128, 3, 3, 3),
        "conditioner.embedders.0.transformer.text_model.x.weight": (4, 4),
    }
    for prefix in ("", PREFIX):
        tensors = infos(shapes_of(TINY["flux1"], "original"), prefix) | infos(others)
        identity = identify(tensors, "file")
        assert identity.table.title == "FLUX.1, original layout"
        assert len(identity.names) == len(tensors) - len(others)
        assert {(c.name, c.tensors, c.nbytes) for c in identity.ignored} == {
            ("VAE", 2, 2 * (512 * 16 * 9 + 128 * 27)),
            ("text encoder 'clip_l'", 2, 2 * 769),
            ("text encoder 't5xxl'", 1, 2 * 6400),
            ("text encoder '0'", 1, 32),
        }
    # What samplers leave in such files.
    tensors = infos(shapes_of(TINY["flux1"], "original"), PREFIX) | infos({"v_pred": (), "model_sampling.sigmas": (9,)})
    assert [str(c) for c in identify(tensors, "file").ignored] == [
        "noise schedule (2 tensors, 0.0 MB)",
    ]
    assert "VAE (1 tensors" in refusal({"vae.encoder.conv_in.weight": (4,)})


@pytest.mark.parametrize(
    "key",
    [
        *("betas", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("posterior_variance", "sqrt_recipm1_alphas_cumprod", "denoiser.sigmas", "edm_vpred.sigma_max", "ztsnr"),
        *("model_ema.decay", "image_encoder.x.weight"),
    ],
)
def test_what_merged_files_carry_along(key: str) -> None:
    tensors = infos(shapes_of(TINY["sd3"], "original"), PREFIX) | infos({key: (9,)})
    assert [c.tensors for c in identify(tensors, "file").ignored] == [1]


@pytest.mark.parametrize("key", ["img_in.lora_scale", "distilled_guidance_layer.in_proj.weight", "__x__", "betas.0"])
def test_a_key_without_the_prefix_is_not_dropped(key: str) -> None:
    tensors = infos(shapes_of(TINY["flux1"], "original"), PREFIX)
    with pytest.raises(CheckpointError, match="keys fit") as caught:
        identify(tensors | infos({key: (4,)}), "file")
    assert repr(key) in str(caught.value)


def test_comfyuis_mark_counts_with_the_prefix_and_without() -> None:
    spec = TINY["qwen-image"]
    assert spec.still_references
    for mark in (STILL_REFERENCES, PREFIX + STILL_REFERENCES):
        shapes = shapes_of(spec, "original")
        del shapes[STILL_REFERENCES]
        tensors = infos(shapes, PREFIX) | infos({mark: (0,)})
        identity = identify(tensors, "file")
        assert identity.names[STILL_REFERENCES] == mark and not identity.ignored
        assert inferred(identity, tensors).still_references
    twice = infos(shapes_of(spec, "original"), PREFIX) | infos({STILL_REFERENCES: (0,)})
    with pytest.raises(CheckpointError, match="every tensor once"):
        identify(twice, "file")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_foreign_key_is_named_and_the_closest_families_are_listed(family: str, layout: KeyLayout) -> None:
    shapes = shapes_of(TINY[family], layout)
    said = refusal({**shapes, "distilled_guidance_layer.in_proj.weight": (4, 4)}, PREFIX)
    title = FAMILIES[family].title
    layout = "diffusers" if family == "qwen-image" else layout
    assert f"received: {title}, {layout} layout: {len(shapes)} of {len(shapes) + 1} keys fit; " in said
    assert f"not of {title}, {layout} layout: 'distilled_guidance_layer.in_proj.weight'" in said


def test_unknown_and_ambiguous_keys() -> None:
    said = refusal(["patch_embedding.weight", "head.head.bias"])
    assert "none fits any: 'head.head.bias', 'patch_embedding.weight'" in said and "FLUX.2, Qwen-Image" in said
    said = refusal(["proj_out.weight", "transformer_blocks.0.attn.to_q.weight"])
    assert "fit several" in said and "FLUX.1, diffusers layout: 2 of 2 keys fit" in said
    assert "no tensors" in refusal([])
    assert "none fits any" in refusal(["double_blocks.٣.img_attn.qkv.weight"])  # no digit of a checkpoint


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("a UNet", ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.bias"]),
        ("a UNet", ["down_blocks.0.resnets.0.conv1.weight", "up_blocks.1.resnets.0.conv1.weight"]),
        ("a LoRA", ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]),
        ("a LoRA", ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]),
        ("a LoRA", ["double_blocks.0.processor.qkv_lora1.down.weight", "x.lokr_w1", "x.hada_w1_a"]),
        ("a ControlNet", ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"]),
        ("a ControlNet", ["control_model.input_blocks.0.0.weight"]),
        ("a text encoder", ["text_model.encoder.layers.0.mlp.fc1.weight"]),
        ("a text encoder", ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"]),
        ("a text encoder", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]),
        ("a VAE", ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.bias"]),
        ("a VAE", ["decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"]),
    ],
)
def test_files_of_another_kind(words: str, keys: list[str]) -> None:
    assert f"received: {words}" in refusal(keys)


@pytest.mark.parametrize(
    "scale",
    [
        "single_blocks.0.linear1.scale_weight",  # ComfyUI fp8_scaled
        "single_blocks.0.linear1.weight_scale",
        "single_blocks.0.linear1.comfy_quant",
        "scaled_fp8",
        "single_blocks.0.linear1.weight.absmax",  # bitsandbytes
        "single_blocks.0.linear1.weight.quant_state.bitsandbytes__nf4",
        "single_blocks.0.linear1.SCB",
        "single_transformer_blocks.0.qkv_proj.qweight",  # nunchaku, which has low-rank factors too
    ],
)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_quantized_checkpoints(scale: str, prefix: str) -> None:
    shapes = shapes_of(TINY["flux1"], "original")
    said = refusal({**shapes, scale: (1,), "single_transformer_blocks.0.qkv_proj.lora_down": (4, 4)}, prefix)
    assert "received: a quantized model" in said and "fp16 or bf16 checkpoint" in said


def test_norms_as_comfyui_spells_them() -> None:
    shapes = shapes_of(TINY["flux2"], "original")
    respelled = {key.replace("_norm.scale", "_norm.weight"): shape for key, shape in shapes.items()}
    assert respelled != shapes
    tensors = infos(respelled)
    identity = identify(tensors, "file")
    assert set(identity.names) == set(shapes) and set(identity.names.values()) == set(respelled)
    assert dataclasses.replace(inferred(identity, tensors), name=TINY["flux2"].name) == TINY["flux2"]
    assert "every tensor once" in refusal({**shapes, **respelled})


def test_what_tensors_cannot_tell_is_said() -> None:
    (flux,) = (table for table in KEY_TABLES if table.title == "FLUX.1, original layout")
    (sd3,) = (table for table in KEY_TABLES if table.title.endswith("3.5, original layout"))
    narrow = dataclasses.replace(TINY["flux1"], num_heads=2, head_dim=64, cond_dim=128, rope_axes=(8, 28, 28))
    found = infer_spec(flux, shapes_of(narrow, "original"), where="file", name=narrow.name)
    assert found == narrow
    (note,) = assumed(found, shapes_of(narrow, "original"))
    assert "RoPE's axes take 8, 28, 28 channels of a head of 64" in note and "config.json" in note
    assert recognized(found, flux) == "FLUX.1, original layout, by its tensors"

    plain = dataclasses.replace(TINY["sd3"], qk_norm=False, num_heads=3, cond_dim=192)
    shapes = shapes_of(plain, "original")
    assert shapes.pop(FAMILIES["sd3"].buffers[POSITION_TABLE]) == (1, plain.pos_max_size**2, 192)
    found = infer_spec(sd3, shapes, where="file", name=plain.name)
    assert found == dataclasses.replace(plain, pos_max_size=192)
    heads, positions = assumed(found, shapes)
    assert "heads are 64 wide" in heads and "192² grid" in positions


def test_a_pruned_model_is_its_own_architecture() -> None:
    """As published but for its depth (FLUX.1 with 8 joint blocks): nothing is assumed."""
    for family, spec in TINY.items():
        shapes = shapes_of(spec, "original")
        tensors = infos(shapes)
        identity = identify(tensors, "file")
        assert inferred(identity, tensors, spec.name) == spec, family
        assert not assumed(spec, shapes)


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("flux1", "img_in.weight", None),
        ("flux1", "img_in.weight", ()),
        ("flux1", "img_in.weight", (0, 64)),
        ("flux1", "double_blocks.0.img_attn.norm.query_norm.scale", None),
        ("flux1", "double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        ("flux1", "double_blocks.0.img_attn.norm.query_norm.scale", (12,)),
        ("flux1", "double_blocks.0.img_attn.norm.query_norm.scale", (4, 32)),
        ("flux1", "txt_in.bias", ()),
        ("flux2", "double_blocks.0.img_mlp.2.weight", (6144,)),
        ("flux2", "final_layer.linear.weight", (0, 6144)),
        ("sd3", "x_embedder.proj.weight", (1536, 64)),
        ("sd3", "pos_embed", (147456,)),
        ("qwen-image", "img_in.weight", ()),
        ("qwen-image", "proj_out.weight", (3, 3072)),
    ],
)
def test_shapes_of_no_such_model(family: str, key: str, shape: tuple[int, ...] | None) -> None:
    """A tensor that says what the architecture is lacks, or cannot be: an error, and never a crash."""
    shapes = shapes_of(TINY[family], "original")
    assert key in shapes
    if shape is None:
        del shapes[key]
    else:
        shapes[key] = shape
    tensors = infos(shapes)
    with pytest.raises(CheckpointError, match="must hold all of a") as caught:
        inferred(identify(tensors, "file"), tensors)
    assert caught.value.received and caught.value.fix


def test_a_block_of_a_huge_index() -> None:
    shapes = shapes_of(TINY["flux1"], "original")
    for index in ("1000000", "9" * 5000):
        tensors = infos({**shapes, f"double_blocks.{index}.img_mod.lin.bias": (4,)})
        with pytest.raises(CheckpointError):
            inferred(identify(tensors, "file"), tensors)
