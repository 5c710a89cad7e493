"""Each family's adapter takes what diffusers' class takes, gives what the contract says, and refuses the rest."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.diffusers.adapter import Call
from mmdit_deploy.diffusers.adapters import ADAPTERS
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.families import FAMILIES, config_of, position_ids
from mmdit_deploy.spec import PRECISIONS, ModelSpec

RANGES = {"batch": Range(1, 2, 4), "img_tokens": Range(1, 16, 256), "txt_tokens": Range(1, 8, 16)}
ROWS, COLS, TEXT = 4, 6, 5


@pytest.fixture
def specs(tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec]) -> Mapping[str, ModelSpec]:
    """A tiny model of each family, by the family's name."""
    return {"sd3": tiny_spec, **{name: tiny_families[name] for name in ("flux1", "flux2", "qwen-image")}}


def contract_of(spec: ModelSpec) -> Contract:
    return Contract.of(spec, PRECISIONS["fp16"], RANGES)


def arguments_for(spec: ModelSpec, batch: int = 2) -> dict[str, Any]:
    """What diffusers' class is called with, besides ``hidden_states``."""
    img_ids, txt_ids = (torch.from_numpy(ids) for ids in position_ids(spec, [(ROWS, COLS)], TEXT))
    everything = {
        "encoder_hidden_states": torch.ones(batch, TEXT, spec.txt_dim),
        "pooled_projections": torch.ones(batch, spec.pooled_dim),
        "timestep": torch.tensor([1.0, 0.5])[:batch],
        "img_ids": img_ids,
        "txt_ids": txt_ids,
        "guidance": torch.full((1,), 3.5).expand(batch),
        "img_shapes": [[(1, ROWS, COLS)]] * batch,
    }
    adapter = ADAPTERS[spec.family]
    taken = (*adapter.tensors, *adapter.made_of)
    return {n: v for n, v in everything.items() if n in taken and (n != "guidance" or spec.guidance)}


def hidden_states(spec: ModelSpec, batch: int = 2) -> Tensor:
    if spec.family == "sd3":
        return torch.ones(batch, spec.latent_channels, 2 * ROWS, 2 * COLS)
    return torch.ones(batch, ROWS * COLS, spec.img_dim)


def inputs_for(spec: ModelSpec, hidden: Tensor | None = None, **changes: Any) -> dict[str, Tensor]:
    """The engine's inputs; an argument that is changed to None is not given."""
    arguments = {name: v for name, v in {**arguments_for(spec), **changes}.items() if v is not None}
    return ADAPTERS[spec.family].inputs(
        Call(spec, contract_of(spec), hidden_states(spec) if hidden is None else hidden, arguments)
    )


def shapes(inputs: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument_of_diffusers_class_is_known(family: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    forward = inspect.signature(getattr(diffusers, FAMILIES[family].config_class).forward)
    ours = ADAPTERS[family].arguments
    assert set(ours) == set(forward.parameters) - {"self", "hidden_states", "return_dict"}
    assert len(ours) == len(set(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_is_what_the_contract_says(family: str, specs: Mapping[str, ModelSpec]) -> None:
    inputs = inputs_for(specs[family])
    sizes = contract_of(specs[family]).check(shapes(inputs))
    assert sizes == {"batch": 2, "img_tokens": ROWS * COLS, "txt_tokens": TEXT}
    assert all(tensor.is_contiguous() for tensor in inputs.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_timestep_is_every_samples(family: str, specs: Mapping[str, ModelSpec]) -> None:
    for timestep in (torch.tensor(7), torch.tensor([7.0])):
        assert inputs_for(specs[family], timestep=timestep)["timestep"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("family", ["flux1", "flux2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_timestep_is_what_diffusers_class_computes_with(
    family: str, dtype: torch.dtype, specs: Mapping[str, ModelSpec]
) -> None:
    """The pipeline divides by 1000, the class multiplies again, both in the latents' type."""
    diffusers = pytest.importorskip("diffusers")
    spec = specs[family]
    model = getattr(diffusers, FAMILIES[family].config_class)(**config_of(spec)).to(dtype)
    embedding = model.time_text_embed if family == "flux1" else model.time_guidance_embed
    seen: list[Tensor] = []

    def look(module: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].float())
        raise StopIteration

    embedding.register_forward_pre_hook(look)
    divided = torch.arange(1, 1001).to(dtype) / 1000
    arguments = {**arguments_for(spec), "timestep": divided}
    hidden = hidden_states(spec, 1000).to(dtype)
    with pytest.raises(StopIteration), torch.no_grad():
        model(hidden, **{n: t.to(dtype) if n == "encoder_hidden_states" else t for n, t in arguments.items()})
    received = inputs_for(spec, hidden, timestep=divided)["timestep"] * 1000
    assert (received - seen[0]).abs().max() <= 1e-4
    assert dtype == torch.float32 or (divided.float() * 1000 - seen[0]).abs().max() > 0.2


def test_a_latent_is_tokens_in_channel_row_column_order(specs: Mapping[str, ModelSpec]) -> None:
    latent = torch.arange(4 * 4 * 6.0).reshape(1, 4, 4, 6)
    spec = specs["sd3"]
    call = Call(spec, contract_of(spec), latent, arguments_for(spec, 1))
    tokens = ADAPTERS["sd3"].inputs(call)["hidden_states"]
    assert tokens[0, 1, :4].tolist() == latent[0, 0, :2, 2:4].flatten().tolist()
    assert torch.equal(ADAPTERS["sd3"].restore(call, tokens), latent.half())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 4, 7, 8), ["whole patches", "[2, 4, 7, 8]", "multiples"]),
        ((2, 24, 16), ["[batch, channels, rows, columns]", "[2, 24, 16]"]),
        ((1, 4, 2 * 73, 2), ["72 rows", "73 × 1", "smaller"]),
    ],
)
def test_a_latent_without_tokens_is_refused(
    shape: tuple[int, ...], words: list[str], specs: Mapping[str, ModelSpec]
) -> None:
    with pytest.raises(ContractError) as caught:
        inputs_for(specs["sd3"], torch.zeros(shape))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_ids_with_a_batch_are_the_first_samples(family: str, specs: Mapping[str, ModelSpec]) -> None:
    arguments = arguments_for(specs[family])
    batched = {name: torch.stack([arguments[name]] * 2) for name in ("img_ids", "txt_ids")}
    inputs = inputs_for(specs[family], **batched)
    assert all(torch.equal(inputs[name], arguments[name]) for name in batched)


def test_guidance_is_dropped_where_flux2_has_no_use_for_it(specs: Mapping[str, ModelSpec]) -> None:
    klein = dataclasses.replace(specs["flux2"], guidance=False)
    inputs = inputs_for(klein, guidance=torch.tensor([4.0]))
    assert "guidance" not in inputs
    contract_of(klein).check(shapes(inputs))


@pytest.mark.parametrize("family", ["flux1", "qwen-image"])
def test_guidance_of_a_model_that_has_none_is_refused(family: str, specs: Mapping[str, ModelSpec]) -> None:
    spec = dataclasses.replace(specs[family], guidance=False)
    inputs = inputs_for(spec, guidance=torch.tensor([4.0]))
    with pytest.raises(ContractError, match="guidance"):
        contract_of(spec).check(shapes(inputs))


def test_references_are_numbered_as_the_family_does(specs: Mapping[str, ModelSpec]) -> None:
    images = [(ROWS, COLS - 2), (ROWS, 2)]
    expected = position_ids(specs["qwen-image"], images, TEXT)
    inputs = inputs_for(specs["qwen-image"], img_shapes=[[(1, *image) for image in images]] * 2)
    assert [inputs["img_ids"].tolist(), inputs["txt_ids"].tolist()] == [ids.tolist() for ids in expected]


def test_text_without_a_mask_is_all_there(specs: Mapping[str, ModelSpec]) -> None:
    assert inputs_for(specs["qwen-image"])["encoder_hidden_states_mask"].all()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert inputs_for(specs["qwen-image"], encoder_hidden_states_mask=mask)["encoder_hidden_states_mask"].sum() == 7


@pytest.mark.parametrize(
    ("img_shapes", "words"),
    [
        (None, ["img_shapes", "None"]),
        ([], ["img_shapes"]),
        ([[(2, 4, 6)]], ["(2, 4, 6)", "videos"]),
        ([[(4, 6)]], ["(4, 6)"]),
        ([[(1, 4, 5)]], ["4 × 5", "24 tokens"]),
        ([[(1, 4, 6), (1, 2, 2)]], ["4 × 6 + 2 × 2", "24 tokens"]),
    ],
)
def test_images_that_are_not_the_tokens_are_refused(
    img_shapes: Any, words: list[str], specs: Mapping[str, ModelSpec]
) -> None:
    with pytest.raises(ContractError) as caught:
        inputs_for(specs["qwen-image"], img_shapes=img_shapes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_residuals_of_a_controlnet_are_one_tensor(tiny_families: Mapping[str, ModelSpec]) -> None:
    spec = tiny_families["sd3-controlnet"]
    residuals = [torch.full((2, ROWS * COLS, spec.width), float(i)) for i in range(2)]
    stacked = inputs_for(spec, block_controlnet_hidden_states=residuals)["block_controlnet_hidden_states"]
    assert stacked[:, 0, 0, 0].tolist() == [0.0, 1.0]
    without = inputs_for(spec)
    assert not without["block_controlnet_hidden_states"].any()
    contract_of(spec).check(shapes(without))
    for given, words in ((residuals[:1], "takes 2 residuals[^$]*--controlnet 1"), ([], "leave the empty list out")):
        with pytest.raises(UsageError, match=words):
            inputs_for(spec, block_controlnet_hidden_states=given)


def test_residuals_without_an_input_are_refused(specs: Mapping[str, ModelSpec]) -> None:
    with pytest.raises(UsageError, match="--controlnet 3"):
        inputs_for(specs["sd3"], block_controlnet_hidden_states=[torch.ones(1)] * 3)


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, a in ADAPTERS.items() for n in a.refused])
def test_what_an_engine_cannot_do_is_refused(family: str, name: str, specs: Mapping[str, ModelSpec]) -> None:
    for value in ([1], "extract", 7, torch.ones(1), torch.zeros(2)):
        with pytest.raises(UsageError) as caught:
            inputs_for(specs[family], **{name: value})
        assert caught.value.fix == ADAPTERS[family].refused[name] and name in str(caught.value)
    for nothing in (None, False, 0):
        inputs_for(specs[family], **{name: nothing})


@pytest.mark.parametrize("family", FAMILIES)
def test_kwargs_of_attention_are_refused(family: str, specs: Mapping[str, ModelSpec]) -> None:
    kwargs = ADAPTERS[family].attention_kwargs
    for harmless in (None, {}, {"scale": 1.0}, {"scale": 1}):
        inputs_for(specs[family], **{kwargs: harmless})
    for value, words in (
        ({"scale": 0.5}, "--lora FILE:SCALE"),
        ({"ip_adapter_image_embeds": [torch.ones(1)]}, "IP-Adapter"),
        ({"some_mask": 1}, "cannot be changed"),
    ):
        with pytest.raises(UsageError, match=words):
            inputs_for(specs[family], **{kwargs: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_argument_is_refused(family: str, specs: Mapping[str, ModelSpec]) -> None:
    with pytest.raises(UsageError, match="newer diffusers"):
        inputs_for(specs[family], cross_attention_kwargs={})
