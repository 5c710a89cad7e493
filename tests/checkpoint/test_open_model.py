"""One file or a diffusers folder opens as the same model; files that are not whole, or not ours, are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit_deploy.checkpoint import StoredModel, open_model
from mmdit_deploy.checkpoint.keys import Part, parameters
from mmdit_deploy.checkpoint.weights import open_weights, stream_parts
from mmdit_deploy.errors import CheckpointError
from mmdit_deploy.families import PRESETS

PREFIX = "model.diffusion_model."
TINY = ["tiny", "tiny-dual", "tiny-flux1", "tiny-flux1-guidance", "tiny-flux2", "tiny-qwen-image"]
WEIGHTS = "diffusion_pytorch_model"
Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def write(maker: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Writes one tiny model as a file, and may change its tensors: ``write("tiny-flux1", prefix="", edit=None)``."""

    def make(name: str, *, layout: str = "original", prefix: str = "", edit: Edit | None = None) -> Path:
        path = tmp_path / "anything.safetensors"
        path.unlink(missing_ok=True)
        maker.make_file(maker.CONFIGS[name], path, layout=layout, prefix=prefix, dtype=torch.float16)
        if edit is not None:
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
            edit(tensors)
            save_file(tensors, path)
        return path

    return make


@pytest.fixture
def folder(maker: ModuleType, tmp_path: Path) -> Callable[[str], Path]:
    """The same as a diffusers folder."""

    def make(name: str) -> Path:
        maker.make_checkpoint(maker.CONFIGS[name], tmp_path / "folder", dtype=torch.float16)
        return tmp_path / "folder"

    return make


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(path)
    assert caught.value.received and caught.value.fix
    return str(caught.value)


def streamed(model: StoredModel) -> dict[str, torch.Tensor]:
    return dict(stream_parts(model.spec, model, torch.float16))


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", TINY)
def test_a_file_is_the_model_of_the_folder(
    name: str, layout: str, prefix: str, write: Callable[..., Path], folder: Callable[[str], Path]
) -> None:
    """Spec and weights; what tensors do not say (a head's width in SD3 without norms, the positions' base) aside."""
    expected = open_model(folder(name))
    found = open_model(write(name, layout=layout, prefix=prefix))
    fields = ["name"] + (["pos_base_size", "pos_table"] if expected.spec.family == "sd3" else [])
    fields += ["num_heads", "head_dim"] if name == "tiny" else []
    same = {field: getattr(found.spec, field) for field in fields}
    assert dataclasses.replace(expected.spec, **same) == found.spec
    assert found.spec.name == "anything" and found.description == f"checkpoint {found.checkpoint.path}"
    ours, theirs = streamed(found), streamed(expected)
    assert set(theirs) <= set(ours)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert not expected.notes and found.notes


def test_a_position_table_is_read_from_an_original_file(write: Callable[..., Path], maker: ModuleType) -> None:
    """Here the table is of positions in another base than tensors can tell: it is used as it is."""
    model = open_model(write("tiny-qknorm", prefix=PREFIX))
    assert model.spec.pos_table and model.spec.pos_max_size == 24
    (table,) = (p for p in parameters(model.spec) if p.path == "img_embed.positions.table")
    assert torch.equal(model.part(table.parts[0]), maker.position_table(maker.CONFIGS["tiny-qknorm"]).half())


def test_an_all_in_one_file(write: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vae.decoder.conv_in.weight"] = torch.zeros(2, 3)
        tensors["text_encoders.t5xxl.logit_scale"] = torch.zeros(1, dtype=torch.float64)

    plain = streamed(open_model(write("tiny-flux1")))
    spec, source = open_weights(write("tiny-flux1", prefix=PREFIX, edit=add))
    assert spec.family == "flux1"
    assert "ignored: VAE (1 tensors, 0.0 MB)" in source.notes
    assert "ignored: text encoder 't5xxl' (1 tensors, 0.0 MB)" in source.notes
    assert source.notes[0] == "FLUX.1, original layout, by its tensors"
    assert all(torch.equal(tensor, plain[key]) for key, tensor in streamed(source).items())


def test_comfyui_marks_the_file_of_qwen_image_edit_2511(write: Callable[..., Path]) -> None:
    """Its parameters are those of Qwen-Image: an empty tensor says that references are modulated otherwise."""

    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.diffusion_model.__index_timestep_zero__"] = torch.zeros(0)

    name = "tiny-qwen-image"
    marked = open_model(write(name, layout="diffusers", prefix=PREFIX, edit=mark))
    assert marked.spec.still_references and not any("2511" in note for note in marked.notes)
    plain = open_model(write(name, layout="diffusers", prefix=PREFIX))
    assert not plain.spec.still_references and any("--preset qwen-image-edit-2511" in note for note in plain.notes)


@pytest.mark.parametrize("name", ["qwen-image-edit-2511", "qwen-image-edit"])
def test_a_preset_decides_what_tensors_do_not_tell(name: str, write: Callable[..., Path]) -> None:
    preset = PRESETS[name]
    path = write("tiny-qwen-image", layout="diffusers", prefix=PREFIX)
    spec, source = open_weights(path, preset)
    assert spec.still_references == preset.still_references and spec.depth == 3
    assert f"taken from the preset {name}: still_references is {preset.still_references}" in source.notes
    assert not any("2511, add" in note for note in source.notes)


def test_a_preset_decides_nothing_that_the_file_tells(
    write: Callable[..., Path], folder: Callable[[str], Path]
) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors["__index_timestep_zero__"] = torch.zeros(0)

    marked = write("tiny-qwen-image", layout="diffusers", edit=mark)
    assert open_model(marked, PRESETS["qwen-image-edit"]).spec.still_references
    assert not open_model(folder("tiny-qwen-image"), PRESETS["qwen-image-edit-2511"]).spec.still_references
    assert not open_model(write("tiny-qwen-image", layout="diffusers"), PRESETS["sd3-medium"]).spec.still_references


def test_a_quantized_folder_is_refused_by_name(folder: Callable[[str], Path]) -> None:
    """As diffusers saves a model that bitsandbytes quantized: beside the fields of the class."""
    path = folder("tiny-flux1")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "quant_method": "bitsandbytes",
    }
    (path / "config.json").write_text(json.dumps(config))
    for where in (path, path / f"{WEIGHTS}.safetensors"):
        said = refusal(where)
        assert "received: a quantized model" in said and "'bitsandbytes'" in said
        assert "fp16 or bf16 checkpoint" in said and str(path / "config.json") in said
    config["quantization_config"] = ["x" * 500]
    (path / "config.json").write_text(json.dumps(config))
    assert "a quantized model" in refusal(path)


def test_the_config_beside_a_diffusers_file_is_read(folder: Callable[[str], Path]) -> None:
    """It says what tensors do not: here heads of 16, where there is no norm that tells."""
    path = folder("tiny")
    expected = open_model(path)
    found = open_model(path / f"{WEIGHTS}.safetensors")
    assert found.spec == expected.spec and found.spec.head_dim == 16 and "config.json" in found.notes[0]
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))  # another model's
    assert open_model(path / f"{WEIGHTS}.safetensors").spec.head_dim == 64


def test_one_shard_is_not_a_model(maker: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    maker.make_checkpoint(maker.CONFIGS["tiny-flux1"], path, dtype=torch.float16, shard_bytes=3e5)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        said = refusal(shard)
        assert "folder that holds them" in said or "pass the folder that both are in" in said
    (path / "config.json").unlink()
    assert all("folder that holds them and config.json" in refusal(shard) for shard in shards)


def test_tensors_that_do_not_fit_are_listed_as_the_file_calls_them(write: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["single_blocks.1.linear2.bias"]
        tensors["double_blocks.1.img_mlp.0.weight"] = torch.zeros(8, 8).half()
        tensors["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(190, 64).half()  # of 192

    said = refusal(write("tiny-flux1", edit=change))
    assert "1 missing: 'single_blocks.1.linear2.bias'" in said
    assert "'double_blocks.1.img_mlp.0.weight [8, 8], expected [256, 64]'" in said
    assert "'double_blocks.0.img_attn.qkv.weight [190, 64], expected [192, 64]'" in said


def test_a_block_too_many_is_seen(write: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["double_blocks.3.img_mlp.0.bias"] = torch.zeros(256).half()  # and no block 2, and not all of 3

    assert "missing: 'double_blocks.2." in refusal(write("tiny-flux1", edit=add))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_dtypes_that_are_not_converted(write: Callable[..., Path], dtype: torch.dtype) -> None:
    key = "double_blocks.0.img_mlp.0.weight"
    said = refusal(write("tiny-flux2", edit=lambda tensors: tensors.update({key: tensors[key].to(dtype)})))
    assert "fp32, fp16 or bf16" in said and f"1 of 45 in another dtype: '{key} {str(dtype)[6:]}'" in said


def test_a_tensor_that_the_model_lacks(write: Callable[..., Path]) -> None:
    model = open_model(write("tiny-flux2"))
    with pytest.raises(CheckpointError, match=r"must hold the tensor 'pos_embed\.proj\.bias'"):
        model.part(Part("pos_embed.proj.bias", (4,)))
