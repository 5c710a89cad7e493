"""What each part of a plan costs, and the largest one within a budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from mmdit_deploy.calibration import budget as budgets
from mmdit_deploy.calibration.budget import choose, parse_budget
from mmdit_deploy.calibration.quantization import plan_quantization
from mmdit_deploy.calibration.sensitivity import FP8_ATTENTION, Sensitivity, sensitivity, units_of
from mmdit_deploy.calibration.trajectory import calibrate_trajectory, default_samples
from mmdit_deploy.calibration.what_if import Distance, Effect, Part, effects
from mmdit_deploy.checkpoint.keys import Part as StoredPart
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.eager.program import Program
from mmdit_deploy.errors import UsageError
from mmdit_deploy.precision import PrecisionPlan, QuantizationRecipe
from mmdit_deploy.precision.weights import planned_layout
from mmdit_deploy.spec import ModelSpec, precision

Programs = Mapping[str, Program]


class Outliers(RandomWeights):
    """Random weights; in one block's MLP some are so large that INT4 loses those beside them."""

    def part(self, part: StoredPart) -> Tensor:
        weight = super().part(part)
        if part.key == "transformer_blocks.1.ff.net.0.proj.weight":
            weight = weight.clone()
            weight[:, ::16] *= 40
        return weight


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its plan, and what was measured of it."""

    spec: ModelSpec
    source: RandomWeights
    plan: PrecisionPlan
    samples: list[dict[str, Tensor]]
    programs: Programs
    found: Sensitivity

    def error(self, part: Part) -> Distance:
        (effect,) = effects(self.spec, self.source, self.plan, [part], self.samples, programs=self.programs)
        return Distance.worst(effect.output)

    def choose(self, limit: float) -> budgets.Chosen:
        args = (self.spec, self.source, self.plan, self.samples, limit)
        return choose(*args, found=self.found, programs=self.programs)


def measured(
    spec: ModelSpec, source: RandomWeights, recipe: QuantizationRecipe, name: str, programs: Programs
) -> Model:
    """With inputs of two steps at two sizes."""
    samples: list[dict[str, Tensor]] = []
    statistics = calibrate_trajectory(
        spec,
        source,
        torch.float16,
        samples=default_samples(spec, sizes=((4, 6, 5), (6, 4, 9)), prompts=1),
        steps=3,
        programs=programs,
        visit=lambda step, states: samples.extend(map(dict, states)) if step != 1 else None,
    )
    plan = plan_quantization(spec, precision(name), recipe, statistics, source)
    found = sensitivity(spec, source, plan, samples, programs=programs)
    return Model(spec, source, plan, samples, programs, found)


@pytest.fixture(scope="module")
def model(tiny_models: Mapping[str, ModelSpec], programs_for: Callable[[ModelSpec], Programs]) -> Model:
    """Two blocks in FP8 with FP8 attention, and modulation's weights; the first block has two attentions."""
    spec = tiny_models["sd3"]
    recipe = QuantizationRecipe.default("fp8").changed({"modulation": "fp8-weights"})
    return measured(spec, RandomWeights(5), recipe, "fp8", programs_for(spec))


def whole(plan: PrecisionPlan) -> Part:
    return Part(frozenset(plan.linears), frozenset(plan.attentions))


def test_every_quantized_layer_is_in_one_unit_of_a_block_and_a_role(model: Model) -> None:
    units = units_of(model.spec, model.plan)
    assert sorted(path for unit in units for path in unit.part.linears) == sorted(model.plan.linears)
    roles = {unit.role for unit in units if unit.block == "blocks.1"}
    assert roles == {"attention", "mlp", "modulation", FP8_ATTENTION}


def test_units_know_the_bytes_that_they_save(model: Model) -> None:
    plain, linears = PrecisionPlan(precision("fp16")), dataclasses.replace(model.plan, attentions={})
    total = [sum(t.nbytes for t in planned_layout(model.spec, plan).tensors.values()) for plan in (plain, linears)]
    assert sum(unit.saved for unit in units_of(model.spec, model.plan)) == total[0] - total[1]


def test_the_error_is_that_of_the_model_with_only_that_quantized(model: Model) -> None:
    row = next(r for r in model.found.rows if (r.unit.block, r.unit.role) == ("blocks.1", "mlp"))
    assert model.error(row.unit.part) == row.output
    assert 0 < row.output.rel_l2 < 0.1
    assert 0.99 < row.output.cosine < 1
    assert model.error(Part()) == Distance(0.0, pytest.approx(1.0))
    assert model.error(whole(model.plan)).rel_l2 > max(r.output.rel_l2 for r in model.found.rows)


def test_every_block_and_role_is_measured(model: Model) -> None:
    assert all(row.output.rel_l2 > 0 and row.local.rel_l2 > 0 for row in model.found.rows)
    blocks = ["blocks.0", "blocks.1", "final_modulation"]
    assert list(dict.fromkeys(row.unit.block for row in model.found.rows)) == blocks


def test_units_are_followed_in_one_pass_or_in_several_with_the_same_result(model: Model) -> None:
    read: list[str] = []
    again = sensitivity(
        model.spec,
        model.source,
        model.plan,
        model.samples,
        programs=model.programs,
        at_once=5,
        progress=lambda name, index, count: read.append(name),
    )
    assert again == model.found
    assert read.count("final") == -(-len(model.found.rows) // 5)


def test_a_table_and_json_name_block_and_role(model: Model) -> None:
    lines = model.found.text().splitlines()
    assert lines[1].split() == ["attention", "mlp", "modulation", "fp8", "attention"]
    assert [line.split()[0] for line in lines[2:]] == ["blocks.0", "blocks.1", "final_modulation"]
    rows = json.loads(json.dumps(model.found.to_json()))
    places = [(row.unit.block, row.unit.role) for row in model.found.rows]
    assert [(row["block"], row["role"]) for row in rows] == places
    assert all(row["rel_l2"] > 0 and row["local_cosine"] > 0.9 for row in rows)


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_the_chosen_set_was_measured_within_the_budget(model: Model, share: float) -> None:
    limit = share * model.error(whole(model.plan)).rel_l2
    chosen = model.choose(limit)
    assert model.error(whole(chosen.plan)) == chosen.error
    assert 0 < chosen.error.rel_l2 <= limit < max(found for _, found in chosen.measured)  # one more was too many
    assert 0 < len(chosen.plan.linears) < len(model.plan.linears)
    assert chosen.saved == sum(row.unit.saved for row, taken in chosen.rows if taken)
    assert f"of {limit:.2%} allowed" in chosen.text()
    assert json.loads(json.dumps(chosen.to_json()))["rel_l2"] == chosen.error.rel_l2
    modulations = {taken for row, taken in chosen.rows if row.unit.role == "modulation"}
    assert len(modulations) == 1  # together: one matrix product makes them


def test_a_generous_budget_takes_everything_and_a_tiny_one_nothing(model: Model) -> None:
    everything = model.choose(0.5)
    assert everything.plan == model.plan
    assert len(everything.measured) == 1
    nothing = model.choose(1e-7)
    assert nothing.plan.plain
    assert (nothing.error, nothing.saved) == (Distance(0.0, 1.0), 0)


def test_what_quantizes_badly_is_left_out(model: Model) -> None:
    model = measured(model.spec, Outliers(6), QuantizationRecipe.default("w4a16"), "w4a16", model.programs)
    worst = max(model.found.rows, key=lambda row: row.local.rel_l2)
    assert (worst.unit.block, worst.unit.role) == ("blocks.1", "mlp")
    rest = [row.unit.part for row in model.found.rows if row is not worst]
    limit = model.error(Part(frozenset().union(*(part.linears for part in rest)))).rel_l2
    chosen = model.choose(1.01 * limit)
    assert [row for row, taken in chosen.rows if not taken] == [worst]


def test_the_search_holds_the_budget_whatever_predictions_are_worth(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def otherwise(*args: object, **kwargs: object) -> list[Effect]:
        """Every layer costs 1 %, whatever was predicted."""
        (part,) = args[3]  # type: ignore[misc]
        asked.append(len(part.linears))
        return [Effect((Distance(0.01 * len(part.linears), 1.0),), None)]

    monkeypatch.setattr(budgets, "effects", otherwise)
    for limit in (0.005, 0.05, 0.12, 0.2, 1.0):
        asked.clear()
        chosen = model.choose(limit)
        assert 0.01 * len(chosen.plan.linears) <= limit
        assert len(asked) <= 8


@pytest.mark.parametrize(
    "text", ["0.05", "rel_l2=", "rel_l2=-1", "rel_l2=nan", "rel_l2=inf", "rel_l2=0", "rel_l2=1", "cosine=0.9", ""]
)
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a budget is a relative L2 error"):
        parse_budget(text)


def test_a_budget_is_a_relative_error() -> None:
    assert parse_budget("rel_l2=0.05") == 0.05
