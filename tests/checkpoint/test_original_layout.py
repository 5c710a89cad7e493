"""Original → canonical → diffusers and back, exact to the bit, for every family; diffusers' own converters agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit_deploy.checkpoint import open_model
from mmdit_deploy.checkpoint.keys import Parameter, Part, parameters
from mmdit_deploy.checkpoint.original_layout import from_original, stored_parts, to_original
from mmdit_deploy.families import FAMILIES, POSITION_TABLE, preset, spec_from_config
from mmdit_deploy.spec import ModelSpec

single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
CLASSES = [family.config_class for family in FAMILIES.values()]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Tensors = dict[str, torch.Tensor]


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        a[key].dtype == b[key].dtype
        and a[key].shape == b[key].shape
        and torch.equal(a[key].contiguous().view(torch.uint8), b[key].contiguous().view(torch.uint8))
        for key in a
    )


def table_of(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every tensor of a checkpoint, the position table too."""
    return parameters(dataclasses.replace(spec, pos_table=spec.pos_max_size > 0))


def original_of(spec: ModelSpec, canonical: Tensors) -> Tensors:
    found: Tensors = {}
    for parameter in table_of(spec):
        stored = to_original(parameter, [canonical[part.key] for part in parameter.parts])
        parts = stored_parts(parameter, "original")
        assert [part.shape for part in parts] == [tuple(t.shape) for t in stored]
        found |= {part.key: tensor for part, tensor in zip(parts, stored, strict=True)}
    return found


def canonical_of(spec: ModelSpec, original: Tensors) -> Tensors:
    found: Tensors = {}
    for parameter in table_of(spec):
        parts = from_original(parameter, [original[part.key] for part in stored_parts(parameter, "original")])
        found |= {part.key: tensor for part, tensor in zip(parameter.parts, parts, strict=True)}
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("class_name", CLASSES)
def test_round_trips_are_exact_to_the_bit(
    class_name: str,
    seed: int,
    maker: ModuleType,
    random_config: Callable[[str, int], dict[str, Any]],
    random_bits: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:
    """diffusers says which tensors there are; each is of random bits, in one of the three dtypes."""
    config = random_config(class_name, seed)
    spec = spec_from_config(config, "tiny")
    state = maker.meta_model(config).state_dict()
    canonical = {
        key: random_bits(tuple(tensor.shape), DTYPES[(seed + i // 40) % 3], i)
        for i, (key, tensor) in enumerate(state.items())
    }
    for parameter in table_of(spec):  # what is one tensor in the original layout has one dtype
        for part in parameter.parts[1:]:
            canonical[part.key] = canonical[part.key].to(canonical[parameter.parts[0].key].dtype)

    original = original_of(spec, canonical)
    assert same_bits(canonical_of(spec, original), canonical)
    assert same_bits(original_of(spec, canonical_of(spec, original)), original)

    # The same through a file, which nothing but its tensors describes
    save_file({key: tensor.contiguous() for key, tensor in original.items()}, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors")
    for parameter in parameters(model.spec):
        for part in parameter.parts:
            assert same_bits({"": model.part(part)}, {"": canonical[part.key]}), part.key
    assert same_bits(load_file(tmp_path / "model.safetensors"), original)


@pytest.mark.parametrize("name", ["tiny", "tiny-qknorm", "tiny-dual", "tiny-flux2", "tiny-flux2-guidance"])
def test_diffusers_converters_agree(name: str, maker: ModuleType, tmp_path: Path) -> None:
    config = maker.CONFIGS[name]
    spec = spec_from_config(config, name)
    convert = {
        "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    }[spec.family]
    maker.make_file(config, tmp_path / "original.safetensors", layout="original", dtype=torch.bfloat16)
    maker.make_file(config, tmp_path / "diffusers.safetensors", layout="diffusers", dtype=torch.bfloat16)
    original, canonical = (load_file(tmp_path / f"{layout}.safetensors") for layout in ("original", "diffusers"))
    assert same_bits(canonical_of(spec, original), canonical)
    assert same_bits(convert(dict(original)), canonical)


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
def test_diffusers_converter_of_flux1_agrees(name: str, random_bits: Callable[..., torch.Tensor]) -> None:
    """It takes FLUX.1's real width for granted, and cuts by rows: so do we here, with 2 columns in each matrix."""
    spec = dataclasses.replace(preset(name), depth=2, single_depth=2)
    assert spec.width == 3072
    canonical = {
        part.key: random_bits((part.shape[0], *(2 for _ in part.shape[1:])), torch.bfloat16, i)
        for i, part in enumerate(part for parameter in parameters(spec) for part in parameter.parts)
    }
    original: Tensors = {}
    for parameter in parameters(spec):
        (stored,) = to_original(parameter, [canonical[part.key] for part in parameter.parts])
        assert parameter.original is not None
        original[parameter.original] = stored
    assert ("guidance_in.in_layer.weight" in original) == (name == "flux1-dev")
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert same_bits(converted, canonical)


@pytest.mark.parametrize("name", ["tiny-dual", "tiny-flux1-guidance", "tiny-flux2", "tiny-qwen-image"])
def test_diffusers_class_loads_what_an_original_file_gives(name: str, maker: ModuleType, tmp_path: Path) -> None:
    config = maker.CONFIGS[name]
    path = tmp_path / "model.safetensors"
    maker.make_file(config, path, layout="original", dtype=torch.float32)
    source = open_model(path)
    model = maker.build(config)
    table = [part for p in parameters(source.spec) for part in p.parts if part.key != POSITION_TABLE]
    loaded = model.load_state_dict({part.key: source.part(part) for part in table}, strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {POSITION_TABLE}
    # and what diffusers holds then is what the same seed gives under diffusers' keys
    maker.make_file(config, tmp_path / "diffusers.safetensors", layout="diffusers", dtype=torch.float32)
    expected = load_file(tmp_path / "diffusers.safetensors")
    expected.pop(POSITION_TABLE, None)
    state = {key: tensor for key, tensor in model.state_dict().items() if key != POSITION_TABLE}
    assert same_bits(state, expected)


def test_shift_and_scale_change_places(random_bits: Callable[..., torch.Tensor]) -> None:
    """The head's modulation, and of SD3 the last block's text: shift before scale in the original layout."""
    spec = preset("sd3-medium")
    swapped = {p.original for p in parameters(spec) if p.swapped}
    assert swapped == {
        f"{module}.adaLN_modulation.1.{leaf}"
        for module in ("final_layer", "joint_blocks.23.context_block")
        for leaf in ("weight", "bias")
    }
    parameter = Parameter("", (4,), (Part("a", (4,)),), "b", swapped=True)
    (tensor,) = to_original(parameter, [torch.tensor([1, 2, 3, 4])])
    assert tensor.tolist() == [3, 4, 1, 2]


def test_a_part_is_a_view_of_the_file(maker: ModuleType, tmp_path: Path) -> None:
    """Q, K and V are read where they lie: no copy of the tensor that joins them is made."""
    path = tmp_path / "model.safetensors"
    maker.make_file(maker.CONFIGS["tiny-flux1"], path, layout="original", dtype=torch.float16)
    model = open_model(path)
    joined = next(p for p in parameters(model.spec) if p.path == "single_blocks.0.proj.weight")
    start = model.checkpoint.read("single_blocks.0.linear1.weight").data_ptr()
    assert len(joined.parts) == 4
    for part in joined.parts:
        tensor = model.part(part)
        assert tensor.data_ptr() == start and tensor.is_contiguous() and tuple(tensor.shape) == part.shape
        start += tensor.nbytes
