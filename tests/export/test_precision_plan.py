"""Exports whose precision is decided value by value: what is in the bundle, and that it can be made again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.calibration.captured import FORMAT
from mmdit_deploy.calibration.trajectory import default_samples
from mmdit_deploy.checkpoint.keys import Part
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.cli.describe_bundle import describe_bundle
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import UsageError
from mmdit_deploy.export import ExportRequest, export, preflight
from mmdit_deploy.export.calibrated import spaced
from mmdit_deploy.lora import open_lora
from mmdit_deploy.precision import QuantizationRecipe
from mmdit_deploy.spec import ModelSpec, precision
from traces import Traces

pytestmark = pytest.mark.usefixtures("single_thread")

RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(32, 48, 64), "txt_tokens": Range(2, 8, 16)}
SCALES = "calibration.safetensors"
Make = Callable[..., "Made"]


class Scaled(RandomWeights):
    """Random weights, of which those whose keys match are multiplied."""

    def __init__(self, factors: Mapping[str, float]):
        super().__init__(0)
        self._factors = factors

    def part(self, part: Part) -> Tensor:
        tensor = super().part(part)
        for key, factor in self._factors.items():
            if re.fullmatch(key, part.key):
                tensor = tensor * factor
        return tensor


# V of the first block is beyond fp16, what leaves its attention is not.
LARGE_V = {
    r"transformer_blocks\.0\.attn\.to_v\.weight": 1e5,
    r"transformer_blocks\.0\.attn\.(to_out\.0|to_add_out)\.weight": 1e-2,
}


class Made:
    """A bundle, what its manifest says of precision, and what was logged."""

    def __init__(self, path: Path, said: list[str], passed: list[bool]):
        self.path, self.said, self.passed = path, said, passed
        self.manifest = open_bundle(path).manifest
        self.plan: dict[str, Any] = self.manifest.fields["precision_plan"]

    @property
    def weights(self) -> str:
        return self.manifest.files["weights.safetensors"].sha256


@pytest.fixture(scope="module")
def make(
    tiny_spec: ModelSpec,
    traces: Traces,
    tmp_path_factory: pytest.TempPathFactory,
) -> Make:
    """Exports for ort-cpu: ``make("fp8", budget=0.02)``."""

    def run(name: str, base: str | None = None, source: RandomWeights | None = None, **options: Any) -> Made:
        out = tmp_path_factory.mktemp("plans") / "b"
        options = {"verify": False, "ranges": RANGES, **options}
        request = ExportRequest(tiny_spec, source or RandomWeights(0), precision(name, base), out=out, **options)
        said: list[str] = []
        with traces.within(tiny_spec):
            result = export(request, said.append)
        return Made(out, said, [verdict.passed for verdict in result.verdicts])

    return run


@pytest.fixture(scope="module")
def fp8(make: Make) -> Made:
    """Everything that FP8 quantizes by itself."""
    return make("fp8")


@pytest.fixture(scope="module")
def within(make: Make) -> Made:
    """As much in FP8 as a budget allows, verified."""
    return make("fp8", budget=0.004, verify=True)


def counts(made: Made) -> tuple[int, int]:
    return len(made.plan["linears"]), len(made.plan["fp8_attentions"])


def test_a_budget_quantizes_less_and_says_what_it_measured(fp8: Made, within: Made) -> None:
    assert within.passed == [True] and 0 < sum(counts(within)) < sum(counts(fp8))
    budget = within.plan["budget"]
    assert 0 < budget["rel_l2"] <= 0.004
    assert {unit["quantized"] for unit in budget["units"]} == {True, False}
    assert any(line.startswith("budget: pass 2 over the model") for line in within.said)


def test_scales_of_a_budget_make_its_bundle_again_and_again(make: Make, within: Made) -> None:
    made = within
    for _ in range(2):
        made = make("fp8", scales=made.path / SCALES)
        assert made.weights == within.weights
        assert made.plan["linears"] == within.plan["linears"]
        assert made.plan["fp8_attentions"] == within.plan["fp8_attentions"]
        assert not any(line.startswith("calibration") for line in made.said)


def test_scales_of_a_budget_are_not_for_what_it_was_not_asked_of(
    tiny_spec: ModelSpec, within: Made, tmp_path: Path
) -> None:
    recipe = QuantizationRecipe.parse({"modulation": "fp8-weights"}, "fp8")
    request = ExportRequest(
        tiny_spec,
        RandomWeights(0),
        precision("fp8"),
        out=tmp_path / "b",
        ranges=RANGES,
        quantization=recipe,
        scales=within.path / SCALES,
    )
    with pytest.raises(UsageError, match="scales of nothing"):
        preflight(request)


def test_scales_fit_another_compute_type(make: Make, fp8: Made) -> None:
    made = make("fp8", "bf16", scales=fp8.path / SCALES, verify=True)
    assert made.passed == [True] and made.plan["linears"] == fp8.plan["linears"]


def test_an_attention_of_values_beyond_fp16_is_not_fp8_and_its_scales_make_the_bundle_again(make: Make) -> None:
    source = Scaled(LARGE_V)
    made = make("fp8", source=source, fp16_plan="auto", verify=True)
    assert made.passed == [True]
    assert made.plan["bf16_attentions"] == ["blocks.0"] and list(made.plan["fp8_attentions"]) == ["blocks.1"]
    assert any(line.startswith("fp16 plan: pass 1 over the model") for line in made.said)
    again = make("fp8", source=source, fp16_plan="auto", scales=made.path / SCALES)
    assert (again.weights, again.plan["wide"]) == (made.weights, made.plan["wide"])
    third = make("fp8", source=source, fp16_plan="auto", scales=again.path / SCALES)
    assert third.weights == made.weights


def test_fp16_keeps_in_fp32_what_overflows_and_is_within_tolerance(make: Make) -> None:
    source = Scaled({r"transformer_blocks\.1\.ff\.net\.2\.weight": 2e5})
    made = make("fp16", source=source, fp16_plan="auto", verify=True)
    assert made.passed == [True] and "blocks.1" in made.plan["wide"] and "blocks.0" not in made.plan["wide"]
    assert SCALES not in made.manifest.files


def test_captured_inputs_a_lora_outputs_and_a_role_of_its_own_scheme(
    make: Make, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    for index, sample in enumerate(default_samples(tiny_spec, sizes=((4, 8, 5), (6, 6, 9)), prompts=1)):
        timestep = torch.full_like(sample.inputs["timestep"], 300.0 * (index + 1))
        inputs = {**sample.inputs, "timestep": timestep}
        tensors |= {f"{index}.{name}": t.contiguous() for name, t in inputs.items()}
    captured, lora = tmp_path / "captured.safetensors", tmp_path / "lora.safetensors"
    save_file(tensors, captured, {"format": FORMAT, "family": tiny_spec.family})
    width, key = tiny_spec.width, "transformer.transformer_blocks.0.attn.to_q"
    low = {f"{key}.lora_A.weight": torch.randn(2, width), f"{key}.lora_B.weight": torch.randn(width, 2)}
    save_file(low, lora)
    made = make(
        "fp8",
        "bf16",
        calib=captured,
        loras=(open_lora(lora, tiny_spec, 0.5),),
        outputs=("blocks.0",),
        quantization=QuantizationRecipe.parse({"modulation": "fp8-weights"}, "fp8"),
        verify=True,
    )
    assert made.passed == [True]
    assert made.plan["calibration"] == {"samples": 2, "captured": captured.name}
    assert any(line.startswith("calibration: pass 1 over the model") for line in made.said)
    schemes = {linear["scheme"] for linear in made.plan["linears"].values()}
    assert schemes == {"fp8", "fp8-weights"} and made.manifest.fields["outputs"] == ["blocks.0"]


def test_samples_that_errors_are_measured_on_are_of_all_of_a_trajectory() -> None:
    names = [f"{i:02}" for i in range(28)]
    assert spaced(names, 6) == ("00", "05", "10", "16", "21", "27")
    assert spaced(names[:3], 6) == ("00", "01", "02")


def test_what_to_calibrate_on_is_refused_where_nothing_is_calibrated(tiny_spec: ModelSpec, tmp_path: Path) -> None:
    request = ExportRequest(
        tiny_spec, RandomWeights(0), precision("w4a16"), out=tmp_path / "b", ranges=RANGES, calib=tmp_path / "none"
    )
    with pytest.raises(UsageError, match="--calib says what to calibrate on"):
        preflight(request)


@pytest.mark.parametrize("name", ["w4a16", "fp8-weights"])
def test_nothing_is_calibrated_where_only_weights_are_quantized(make: Make, name: str) -> None:
    table = {"fp8_attention": False, "attention": name, "mlp": name}
    options: dict[str, Any] = {"quantization": QuantizationRecipe.parse(table, name.split("-", 1)[0])}
    made = make(name.split("-", 1)[0], verify=name == "w4a16", **options)
    assert not any(line.startswith("calibration") for line in made.said) and "calibration" not in made.plan
    assert make(name.split("-", 1)[0], scales=made.path / SCALES, **options).weights == made.weights


def test_graphs_alone_say_what_is_quantized_and_no_numbers(make: Make, fp8: Made) -> None:
    made = make("fp8", graph_only=True)
    assert SCALES not in made.manifest.files
    assert describe_bundle(made.path)["precision_plan"] == describe_bundle(fp8.path)["precision_plan"]
    numbers = [linear["input_amax"] for linear in made.plan["linears"].values()]
    numbers += [a[name] for found in made.plan["fp8_attentions"].values() for a in found for name in "qkv"]
    assert set(numbers) == {None}
