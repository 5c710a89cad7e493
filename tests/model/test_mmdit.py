"""The eager model: its builder, its interface, and the chain of calls that it is the same as."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.errors import SpecError
from mmdit_deploy.families import PRESETS
from mmdit_deploy.model import MMDiT, calls, grid_ids, nearest_square
from mmdit_deploy.model.embeddings import SincosPositions, TablePositions
from mmdit_deploy.spec import ModelSpec, from_depth

Eager = Callable[..., MMDiT]
CHANGES: dict[str, dict[str, object]] = {
    "plain": {},
    "one block": {"depth": 1},
    "no QK norm": {"qk_norm": False},
    "dual attention": {"depth": 3, "dual_attention_blocks": (0, 1)},
    "dual attention in the last block": {"depth": 1, "dual_attention_blocks": (0,)},
    "a table": {"pos_table": True, "pos_max_size": 9},
}


class RandomWithTable(RandomWeights):
    """Random weights for a model whose positions are a table, too."""

    def part(self, part: object) -> Tensor:
        if part.key.endswith("pos_embed.pos_embed"):  # type: ignore[attr-defined]
            return random_tensor(self.seed, part.key, part.shape, std=0.5)  # type: ignore[attr-defined]
        return super().part(part)  # type: ignore[arg-type]


@pytest.fixture(params=CHANGES)
def model(request: pytest.FixtureRequest, tiny_spec: ModelSpec, eager_model: Eager) -> MMDiT:
    return eager_model(dataclasses.replace(tiny_spec, **CHANGES[request.param]), RandomWithTable(4))


def inputs(spec: ModelSpec, rows: int = 5, cols: int = 7) -> dict[str, Tensor]:
    def draw(name: str, *shape: int) -> Tensor:
        return random_tensor(9, name, (2, *shape), std=1.0)

    return {
        "hidden_states": draw("img", rows * cols, spec.img_dim),
        "encoder_hidden_states": draw("txt", 6, spec.txt_dim),
        "timestep": torch.tensor([999.0, 12.5]),
        "pooled_projections": draw("pooled", spec.pooled_dim),
        "img_ids": grid_ids(rows, cols),
    }


@torch.inference_mode()
def test_forward_is_the_chain_of_calls_to_the_bit(model: MMDiT) -> None:
    """The model that people read is the one that is traced and verified."""
    spec = model.spec
    names = tuple(f"blocks.{i}" for i in reversed(range(spec.depth)))
    feed = inputs(spec)
    values = dict(feed)
    for call in calls(spec, names):
        out = model.get_submodule(call.path)(*(values[name] for name in call.inputs))
        out = out if isinstance(out, tuple) else (out,)
        values.update(zip(call.outputs, out, strict=True))
        for name, tensor, reference in zip(call.outputs, call.kind.outputs, out, strict=True):
            sizes = {"batch": 2, "img_tokens": 35, "txt_tokens": 6}
            assert tuple(reference.shape) == tensor.shape(sizes), name
    received = model(**feed, outputs=names)
    assert len(received) == 1 + spec.depth
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


def test_kinds_do_not_grow_with_depth(tiny_spec: ModelSpec) -> None:
    kinds = [{call.kind for call in calls(dataclasses.replace(tiny_spec, depth=d))} for d in (2, 40)]
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


@torch.inference_mode()
def test_no_block_is_near_the_identity_with_random_weights(model: MMDiT) -> None:
    """With AdaLN-Zero's own initial values every block would be, and a comparison would prove nothing."""
    feed = inputs(model.spec)
    values = dict(feed)
    for call in calls(model.spec):
        out = model.get_submodule(call.path)(*(values[name] for name in call.inputs))
        out = out if isinstance(out, tuple) else (out,)
        values.update(zip(call.outputs, out, strict=True))
        if call.path.startswith("blocks."):
            for before, after in zip(call.inputs, out, strict=False):
                change = (after - values[before]).norm() / values[before].norm()
                assert 0.05 < change < 10, call.path  # ten times what fp16 may be off by


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections", "img_ids"]
)
def test_every_input_matters(tiny_spec: ModelSpec, eager_model: Eager, name: str) -> None:
    model = eager_model(tiny_spec, RandomWeights(4))
    feed = inputs(tiny_spec)
    before = model(**feed)
    changed = feed[name] / 1000 if name == "timestep" else feed[name].flip(0)
    after = model(**{**feed, name: changed})
    assert (after - before).norm() > 1e-2 * before.norm()


@torch.inference_mode()
def test_samples_of_a_batch_do_not_mix(tiny_spec: ModelSpec, eager_model: Eager) -> None:
    model = eager_model(tiny_spec, RandomWeights(4))
    feed = inputs(tiny_spec)
    alone = {n: t if n == "img_ids" else t[1:] for n, t in feed.items()}
    torch.testing.assert_close(model(**feed)[1:], model(**alone), rtol=1e-5, atol=1e-5)


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
