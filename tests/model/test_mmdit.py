"""The eager model: its builder, its interface, and the chain of calls that it is the same as."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import SpecError
from mmdit_deploy.families import PRESETS, position_ids
from mmdit_deploy.model import Call, MMDiT, calls, grid_ids, nearest_square
from mmdit_deploy.model.embeddings import SincosPositions, TablePositions
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs

Eager = Callable[..., MMDiT]
CHANGES: dict[str, dict[str, object]] = {
    "plain": {},
    "one block": {"depth": 1},
    "no QK norm": {"qk_norm": False},
    "dual attention": {"depth": 3, "dual_attention_blocks": (0, 1)},
    "dual attention in the last block": {"depth": 1, "dual_attention_blocks": (0,)},
    "a table": {"pos_table": True, "pos_max_size": 9},
}
FAMILIES = ("flux1", "flux2", "qwen-image", "qwen-image-edit-2511", "sd3-controlnet")
SIZES = {"batch": 2, "img_tokens": 35, "txt_tokens": 6}


class RandomWithTable(RandomWeights):
    """Random weights for a model whose positions are a table, too."""

    def part(self, part: object) -> Tensor:
        if part.key.endswith("pos_embed.pos_embed"):  # type: ignore[attr-defined]
            return random_tensor(self.seed, part.key, part.shape, std=0.5)  # type: ignore[attr-defined]
        return super().part(part)  # type: ignore[arg-type]


@pytest.fixture(params=[*CHANGES, *FAMILIES])
def model(
    request: pytest.FixtureRequest, tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec], eager_model: Eager
) -> MMDiT:
    if request.param in tiny_families:
        return eager_model(tiny_families[request.param], RandomWeights(4))
    return eager_model(dataclasses.replace(tiny_spec, **CHANGES[request.param]), RandomWithTable(4))


def inputs(spec: ModelSpec) -> dict[str, Tensor]:
    """Of two images of 5 × 7 tokens, the timesteps far apart."""
    feed = case_inputs(Case(2, 5, 7, 6, timestep=500.0), contract_of(spec), spec)
    return {**feed, "timestep": torch.tensor([999.0, 12.5]) / spec.time_scale}


def contract_of(spec: ModelSpec) -> Contract:
    return Contract.of(spec, PRECISIONS["fp32"])


def step(model: MMDiT, values: dict[str, Tensor], outputs: Sequence[str] = ()) -> Iterator[tuple[Call, list[Tensor]]]:
    """Run the chain of calls; each with what it makes, which goes to the values as well."""
    for call in calls(model.spec, outputs):
        arguments = {t.name: values[name] for t, name in zip(call.kind.inputs, call.inputs, strict=True)}
        out = model.get_submodule(call.path)(**arguments)
        made = list(out) if isinstance(out, tuple) else [out]
        values.update(zip(call.outputs, made, strict=True))
        yield call, made


@torch.inference_mode()
def test_forward_is_the_chain_of_calls_to_the_bit(model: MMDiT) -> None:
    """The model that people read is the one that is traced and verified."""
    names = tuple(reversed(model.spec.block_names))
    feed = inputs(model.spec)
    values = dict(feed)
    for call, made in step(model, values, names):
        for tensor, out in zip(call.kind.outputs, made, strict=True):
            assert tuple(out.shape) == tensor.shape(SIZES), (call.path, tensor.name)
    received = model(**feed, outputs=names)
    assert len(received) == 1 + len(names)
    for name, tensor in zip(("sample", *names), received, strict=True):
        assert torch.equal(tensor, values[name]), name
    assert torch.equal(model(**feed), values["sample"])


def test_every_submodule_with_weights_is_called_once(model: MMDiT) -> None:
    paths = [call.path for call in calls(model.spec)]
    assert len(paths) == len(set(paths))
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{path}.") for path in paths) == 1, name


def test_a_kind_takes_its_weights_from_its_submodule(model: MMDiT) -> None:
    for call in calls(model.spec):
        with torch.device("meta"):
            built = {name: p.shape for name, p in call.kind.build().named_parameters()}
        assert built == {name: p.shape for name, p in model.get_submodule(call.path).named_parameters()}


def test_kinds_do_not_grow_with_depth(model: MMDiT) -> None:
    # Two more, so that there are plain blocks even where the first have two attentions.
    spec = dataclasses.replace(model.spec, depth=model.spec.depth + 2)
    deep = dataclasses.replace(spec, depth=40, single_depth=40 if spec.single_depth else 0)
    kinds = [{call.kind for call in calls(s)} for s in (spec, deep)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == len({kind.function for kind in kinds[0]})


@pytest.mark.parametrize(
    "name", ["blocks.2", "blocks.-1", "blocks.x", "blocks.", "block.1", "sample", "", "blocks.01", "blocks.١"]
)
def test_an_output_that_is_no_block_is_refused(tiny_spec: ModelSpec, name: str) -> None:
    with pytest.raises(SpecError) as caught:
        calls(tiny_spec, (name,))
    assert caught.value.rule == "an output is named blocks.0 to blocks.1" and repr(name) == caught.value.received


@pytest.mark.parametrize("spec", [*PRESETS.values(), from_depth(2)], ids=lambda s: s.name)
def test_the_parameter_table_is_the_models(spec: ModelSpec) -> None:
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in MMDiT(spec).named_parameters()}
    table = parameters(spec)
    assert {p.path: p.shape for p in table} == expected and len(table) == len(expected)
    for parameter in table:
        assert sum(torch.Size(part.shape).numel() for part in parameter.parts) == parameter.numel
    keys = [part.key for p in table for part in p.parts]
    assert len(keys) == len(set(keys))


def test_an_output_of_single_blocks_is_named_too(tiny_families: Mapping[str, ModelSpec]) -> None:
    with pytest.raises(SpecError, match=r"blocks\.0 to blocks\.1 and single_blocks\.0 to single_blocks\.3"):
        calls(tiny_families["flux1"], ("single_blocks.4",))


@torch.inference_mode()
def test_no_block_is_near_the_identity_with_random_weights(model: MMDiT) -> None:
    """With AdaLN-Zero's own initial values every block would be, and a comparison would prove nothing."""
    values = inputs(model.spec)
    for call, made in step(model, values):
        if call.path in model.spec.block_names:
            for before, after in zip(call.inputs, made, strict=False):
                change = (after - values[before]).norm() / values[before].norm()
                assert 0.03 < change < 10, call.path  # many times what fp16 may be off by


@torch.inference_mode()
def test_every_input_matters(model: MMDiT) -> None:
    feed = inputs(model.spec)
    before = model(**feed)
    for name, tensor in feed.items():
        changed = tensor / 1000 if tensor.dim() == 1 else ~tensor if tensor.dtype == torch.bool else tensor.flip(0)
        if name == "txt_ids" and not tensor.any():
            changed = tensor + 1  # FLUX.1's text is all at the origin
        # a hundred times what fp32 may be off by
        assert (model(**{**feed, name: changed}) - before).norm() > 1e-3 * before.norm(), name


@torch.inference_mode()
def test_samples_of_a_batch_do_not_mix(model: MMDiT) -> None:
    feed = inputs(model.spec)
    axes = {t.name: t.axes.index("batch") for t in contract_of(model.spec).inputs if "batch" in t.axes}
    alone = {name: t.narrow(axes[name], 1, 1) if name in axes else t for name, t in feed.items()}
    torch.testing.assert_close(model(**feed)[1:], model(**alone), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_positions_are_given_together_or_not_at_all(model: MMDiT) -> None:
    """Those of one image, by default: the grid that is nearest to a square."""
    spec = model.spec
    feed = inputs(spec)
    ids = {name: feed.pop(name) for name in ("img_ids", "txt_ids") if name in feed}
    default = dict(zip(ids, map(torch.from_numpy, position_ids(spec, [(5, 7)], 6)), strict=False))
    assert torch.equal(model(**feed), model(**feed, **default))
    if len(ids) == 2:
        for name, other in (("img_ids", "txt_ids"), ("txt_ids", "img_ids")):
            with pytest.raises(SpecError, match="img_ids and txt_ids say positions together") as caught:
                model(**feed, **{name: ids[name]})
            assert caught.value.received == f"{name} alone" and other in str(caught.value)


@torch.inference_mode()
def test_without_a_mask_all_text_counts(tiny_families: Mapping[str, ModelSpec], eager_model: Eager) -> None:
    model = eager_model(tiny_families["qwen-image"], RandomWeights(4))
    feed = inputs(model.spec)
    mask = feed.pop("encoder_hidden_states_mask")
    everything = model(**feed, encoder_hidden_states_mask=torch.ones_like(mask))
    torch.testing.assert_close(model(**feed), everything, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_masked_text_is_not_read(tiny_families: Mapping[str, ModelSpec], eager_model: Eager) -> None:
    """Not at all, whatever is in it: padding is not zeros."""
    model = eager_model(tiny_families["qwen-image"], RandomWeights(4))
    feed = inputs(model.spec)
    mask = feed["encoder_hidden_states_mask"]
    text = feed["encoder_hidden_states"]
    assert not mask.all() and mask.any()
    garbage = torch.where(mask[..., None], text, 100 * text.flip(0) + 1)
    torch.testing.assert_close(model(**feed), model(**{**feed, "encoder_hidden_states": garbage}), rtol=0, atol=0)


@torch.inference_mode()
def test_build_takes_sizes_alone() -> None:
    model = MMDiT.build(img_dim=12, txt_dim=20, hidden_size=64, depth=2, num_heads=2, mlp_ratio=3, pooled_dim=10)
    assert (model.spec.img_dim, model.spec.out_dim, model.spec.width, model.spec.mlp_width) == (
        12,
        12,
        64,
        192,
    )
    assert (model.spec.cond_dim, model.spec.pooled_dim, model.spec.qk_norm) == (64, 10, True)
    out = model(torch.ones(3, 24, 12), torch.ones(3, 5, 20), torch.ones(3), torch.ones(3, 10))
    assert tuple(out.shape) == model.output_size(batch=3, img_tokens=24) == (3, 24, 12)
    assert model.output_size() == (1, 64, 12)
    explicit = model(torch.ones(3, 24, 12), torch.ones(3, 5, 20), torch.ones(3), torch.ones(3, 10), grid_ids(4, 6))
    assert torch.equal(out, explicit)


def test_the_recommended_defaults_are_those_of_build() -> None:
    defaults = {
        name: p.default
        for name, p in inspect.signature(MMDiT.build).parameters.items()
        if p.default not in (None, inspect.Parameter.empty)
    }
    assert MMDiT.recommended_defaults() == defaults
    with torch.device("meta"):
        spec = MMDiT.build(img_dim=4, txt_dim=8, **MMDiT.recommended_defaults()).spec  # type: ignore[arg-type]
    assert (spec.width, spec.depth, spec.num_heads, spec.cond_dim, spec.pooled_dim) == (768, 12, 12, 768, 8)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"hidden_size": 100, "num_heads": 12}, "hidden_size must be a multiple of num_heads"),
        ({"num_heads": 0}, "hidden_size must be a multiple of num_heads"),
        ({"hidden_size": "768"}, "hidden_size must be a multiple of num_heads"),
        ({"hidden_size": 0}, "head_dim must be a whole number"),
        ({"hidden_size": 48, "num_heads": 12}, "head_dim must be a multiple of 8"),
        ({"img_tokens": 0}, "img_tokens must be"),
        ({"txt_tokens": -1}, "txt_tokens must be"),
        ({"img_dim": 0}, "latent_channels must be"),
        ({"depth": 0}, "depth is a whole number from 1 to 128"),
        ({"mlp_ratio": -1}, "mlp_ratio must be"),
        ({"cond_dim": -1}, "cond_dim must be"),
    ],
)
def test_build_says_what_is_wrong(changes: dict[str, object], rule: str) -> None:
    with pytest.raises(SpecError) as caught:
        MMDiT.build(**{"img_dim": 4, "txt_dim": 8, **changes})  # type: ignore[arg-type]
    assert rule in caught.value.rule and caught.value.received and caught.value.fix


@pytest.mark.parametrize(
    ("tokens", "rows", "cols"),
    [(1, 1, 1), (12, 3, 4), (16, 4, 4), (7, 1, 7), (4096, 64, 64), (4095, 63, 65), (4097, 17, 241)],
)
def test_default_positions_are_the_nearest_square(tokens: int, rows: int, cols: int) -> None:
    assert nearest_square(tokens) == (rows, cols)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (4, 4), (9, 3), (2, 9), (9, 9), (8, 5)])
def test_a_table_of_the_formula_gives_the_formula(tiny_spec: ModelSpec, rows: int, cols: int) -> None:
    """Crop and scale agree for odd and even grids, up to the whole table."""
    spec = dataclasses.replace(tiny_spec, pos_max_size=9, pos_base_size=4)
    formula, table = SincosPositions(spec), TablePositions(spec)
    table.table.data = formula.at(grid_ids(9, 9))
    assert torch.equal(table(grid_ids(rows, cols)), formula(grid_ids(rows, cols)))


def test_positions_follow_the_ids_and_not_the_order(tiny_spec: ModelSpec) -> None:
    ids = grid_ids(5, 7)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    positions = SincosPositions(tiny_spec)
    assert torch.equal(positions(ids[order]), positions(ids)[order])
    assert not torch.allclose(positions(ids), positions(ids.flip(1)), atol=1e-2)  # rows are not columns
