"""From recipe and statistics to the plan, and to a file and back: the same to the bit, and for this model alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdit_deploy.calibration.quantization import plan_quantization, plan_recorded
from mmdit_deploy.calibration.scales_file import Scales, read_scales, write_scales
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.calibration.trajectory import calibrate_trajectory, default_samples
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import RandomWeights, read_parameter
from mmdit_deploy.errors import CheckpointError, UsageError
from mmdit_deploy.precision import PrecisionPlan, QuantizationRecipe, linears, role_of
from mmdit_deploy.precision.quantize import quantize_weight
from mmdit_deploy.precision.schemes import stored
from mmdit_deploy.precision.structure import indivisible, structure, unread
from mmdit_deploy.spec import ModelSpec, precision
from mmdit_deploy.spec.precision import QUANTIZED

SOURCE = RandomWeights(5)
FAMILIES = ("sd3", "flux1", "flux2", "qwen-image-edit-2511")
SEED = 7


@pytest.fixture(scope="module")
def statistics_of(
    tiny_models: Mapping[str, ModelSpec], programs_for: Callable[..., Any]
) -> Callable[[str], Statistics]:
    known: dict[str, Statistics] = {}

    def statistics(name: str) -> Statistics:
        if name not in known:
            spec = tiny_models[name]
            samples = default_samples(spec, SEED, sizes=((3, 4, 5), (4, 2, 7)))
            known[name] = calibrate_trajectory(
                spec, SOURCE, torch.float32, samples=samples, steps=1, programs=programs_for(spec)
            )
        return known[name]

    return statistics


@pytest.fixture(scope="module")
def planned(
    tiny_models: Mapping[str, ModelSpec], statistics_of: Callable[[str], Statistics]
) -> Callable[..., PrecisionPlan]:
    """``planned(family, precision, **table)``"""

    def plan(name: str, quantized: str, **table: Any) -> PrecisionPlan:
        recipe = QuantizationRecipe.parse(table, quantized)
        return plan_quantization(tiny_models[name], precision(quantized), recipe, statistics_of(name), SOURCE)

    return plan


def equal(a: PrecisionPlan, b: PrecisionPlan) -> bool:
    """To the bit."""
    if (a.precision, a.attentions, a.wide, set(a.linears)) != (b.precision, b.attentions, b.wide, set(b.linears)):
        return False
    for path, ours in a.linears.items():
        theirs = b.linears[path]
        if (ours.scheme, ours.input_amax) != (theirs.scheme, theirs.input_amax):
            return False
        if (ours.pre_quant_scale is None) != (theirs.pre_quant_scale is None):
            return False
        if ours.pre_quant_scale is not None and not torch.equal(ours.pre_quant_scale, theirs.pre_quant_scale):
            return False
    return True


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_has_all_that_its_layers_are_stored_with(
    name: str, quantized: str, tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec, plan = tiny_models[name], planned(name, quantized)
    expected = structure(spec, precision(quantized), QuantizationRecipe.default(quantized))
    assert {p: x.scheme for p, x in plan.linears.items()} == {p: x.scheme for p, x in expected.linears.items()}
    assert {c: len(each) for c, each in plan.attentions.items()} == {c: len(e) for c, e in expected.attentions.items()}
    assert {role_of(path) for path in plan.linears} <= {"attention", "mlp"} and plan.linears
    for parameter in parameters(spec):
        path = parameter.path.removesuffix(".weight")
        if path in plan.linears:
            weight = read_parameter(SOURCE, parameter, torch.float32)
            tensors = quantize_weight(weight, plan.linears[path], torch.float16)
            assert list(tensors) == [s.name for s in stored(plan.linears[path].scheme, *weight.shape, torch.float16)]


def test_layers_whose_inputs_are_no_whole_blocks_stay_as_they_are(
    tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec, table = tiny_models["sd3"], {"embedders": "w4a16"}  # 24 and 16 inputs, in blocks of 64
    plan = planned("sd3", "w4a16", **table)
    left = indivisible(spec, QuantizationRecipe.parse(table, "w4a16"))
    assert {"txt_embed.proj", "img_embed.proj"} <= set(left)
    assert not set(left) & set(plan.linears)
    wanted = {path for path in linears(spec) if role_of(path) in ("attention", "mlp", "embedders")}
    assert wanted == set(left) | set(plan.linears)


def test_layers_that_nothing_runs_are_not_planned(
    tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec = tiny_models["qwen-image-edit-2511"]
    assert len(unread(spec)) == 3 and unread(spec) < set(linears(spec))
    assert not unread(spec) & set(planned("qwen-image-edit-2511", "fp8").linears)


def test_a_role_and_the_method_are_the_recipes(
    planned: Callable[..., PrecisionPlan], statistics_of: Callable[[str], Statistics]
) -> None:
    seen = statistics_of("sd3").linears
    plain = planned("sd3", "fp8")
    assert all(plan.input_amax == seen[path].amax for path, plan in plain.linears.items())
    clipped = planned("sd3", "fp8", method="percentile", percentile=99, modulation="fp8-weights")
    assert {role_of(path) for path in clipped.linears} == {"attention", "mlp", "modulation"}
    for path, plan in clipped.linears.items():
        if role_of(path) == "modulation":
            assert plan.input_amax is None and plan.scheme.name == "fp8-weights"
        else:
            amax = plain.linears[path].input_amax
            assert plan.input_amax is not None and amax is not None and plan.input_amax < amax
    assert not planned("sd3", "fp8", fp8_attention=False).attentions


def test_a_smoothed_input_has_its_largest_magnitude_after_smoothing(
    planned: Callable[..., PrecisionPlan], statistics_of: Callable[[str], Statistics]
) -> None:
    for path, plan in planned("sd3", "int8", mlp="int8-tensor").linears.items():
        assert plan.pre_quant_scale is not None
        if plan.scheme.name == "int8-tensor":
            assert plan.input_amax == float((statistics_of("sd3").linears[path].channels * plan.pre_quant_scale).max())
        else:
            assert plan.input_amax is None


@pytest.mark.parametrize("quantized", ["fp8", "int8"])
def test_recorded_scales_give_the_same_plan_to_the_bit(
    quantized: str, tmp_path: Path, tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec, plan = tiny_models["sd3"], planned("sd3", quantized)
    scales = Scales(spec, plan.linears, plan.attentions, {"method": "amax", "seed": SEED})
    for name in ("a", "b"):
        write_scales(tmp_path / name, scales)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = read_scales(tmp_path / "a", spec)
    assert read.record == {"method": "amax", "seed": SEED}
    recipe = QuantizationRecipe.default(quantized)
    assert equal(plan_recorded(spec, precision(quantized), recipe, read), plan)
    bf16 = plan_recorded(spec, precision(quantized, "bf16"), recipe, read)
    assert equal(replace(bf16, precision=plan.precision), plan)
    fewer = plan_recorded(spec, precision(quantized), recipe.changed({"mlp": "none", "fp8_attention": False}), read)
    assert fewer.linears and not fewer.attentions and {role_of(path) for path in fewer.linears} == {"attention"}


def test_scales_of_another_scheme_are_not_reused(
    tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec, plan = tiny_models["sd3"], planned("sd3", "fp8", fp8_attention=False)
    scales = Scales(spec, plan.linears, plan.attentions)
    for quantized, table, received in (
        ("int8", {}, "scales of fp8"),
        ("fp8", {"modulation": "fp8-weights"}, "scales of nothing"),
        ("fp8", {}, "scales of nothing"),  # of attentions
    ):
        with pytest.raises(UsageError, match=received):
            plan_recorded(spec, precision(quantized), QuantizationRecipe.parse(table, quantized), scales)


def _without(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors["blocks.0.img.mlp.up.input_amax"]


def _more(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["blocks.9.img.mlp.up.input_amax"] = torch.ones(())


def _nan(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["blocks.0.img.mlp.up.input_amax"] = torch.tensor(float("nan"))


def _negative(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["blocks.0.attention.0.amax"] = torch.tensor([1.0, -1.0, 1.0])


def _long(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["blocks.0.attention.0.amax"] = torch.ones(4)


def _zero_factor(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["blocks.0.img.mlp.up.pre_quant_scale"] = torch.zeros(64)


def _scheme(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["schemes"] = json.dumps({"blocks.0.img.mlp.up": "fp9"})


def _list(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["schemes"] = json.dumps({"blocks.0.img.mlp.up": ["fp8"]})


def _format(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["format"]


def _spec(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["spec"] = json.dumps({**json.loads(metadata["spec"]), "depth": 3})


def _no_spec(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["spec"] = "{}"


SPOILED: dict[str, Callable[[dict[str, Tensor], dict[str, str]], None]] = {
    r"hold blocks.0.img.mlp.up.input_amax \[\]": _without,
    "belong to layers that they name a scheme for": _more,
    "finite fp32 numbers, none below 0": _nan,
    "finite fp32 numbers": _negative,
    r"shape \[4\]": _long,
    "no factor is 0": _zero_factor,
    "'fp9'": _scheme,
    r"\['fp8'\]": _list,
    "say format": _format,
    "depth 3, not 2": _spec,
    "hold the spec": _no_spec,
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_file_that_does_not_fit_is_refused(
    message: str, tmp_path: Path, tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec, plan = tiny_models["sd3"], planned("sd3", "fp8")
    write_scales(tmp_path / "scales", Scales(spec, plan.linears, plan.attentions))
    with safe_open(tmp_path / "scales", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()
    SPOILED[message](tensors, metadata)
    save_file(tensors, tmp_path / "spoiled", metadata)
    with pytest.raises(UsageError, match=message):
        read_scales(tmp_path / "spoiled", spec)


def test_scales_are_of_one_architecture(
    tmp_path: Path, tiny_models: Mapping[str, ModelSpec], planned: Callable[..., PrecisionPlan]
) -> None:
    spec, plan = tiny_models["sd3"], planned("sd3", "fp8")
    write_scales(tmp_path / "scales", Scales(spec, plan.linears, plan.attentions))
    renamed = dataclasses.replace(spec, name="a finetune")
    assert read_scales(tmp_path / "scales", renamed).linears.keys() == plan.linears.keys()
    with pytest.raises(UsageError, match="are of the architecture of"):
        read_scales(tmp_path / "scales", tiny_models["flux1"])
    (tmp_path / "text").write_text("{}")
    with pytest.raises(CheckpointError):
        read_scales(tmp_path / "text", spec)
