"""The weights file of a quantized model: what lies where, in how many bytes, and what is read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mmdit_deploy.checkpoint import SafetensorsFile, write_safetensors
from mmdit_deploy.checkpoint.keys import Part, parameters
from mmdit_deploy.checkpoint.weights import RandomWeights, read_parameter, stream_parts, weights_layout
from mmdit_deploy.families import preset
from mmdit_deploy.model.partition import call_bytes
from mmdit_deploy.precision import SCHEMES, AttentionScales, LinearPlan, PrecisionPlan, Role, linears, role_of
from mmdit_deploy.precision.quantize import dequantize, quantize_weight
from mmdit_deploy.precision.weights import QuantizedWeights, planned_call_bytes, planned_layout, stream_planned
from mmdit_deploy.spec import ModelSpec, precision

SOURCE = RandomWeights(4)
FP16 = precision("fp16")


def plan_of(spec: ModelSpec, **schemes: str) -> PrecisionPlan:
    """By role, the name of a scheme; ``_`` for ``-``."""
    plans = {}
    for path, parameter in linears(spec).items():
        if (name := schemes.get(role_of(path))) is not None:
            scheme = SCHEMES[name]
            smoothing = torch.linspace(0.5, 2, parameter.shape[1]) if scheme.smooth else None
            plans[path] = LinearPlan(scheme, 3.0, smoothing)
    return PrecisionPlan(precision("fp8"), plans)


def everywhere(name: str) -> dict[Role, str]:
    return {"attention": name, "mlp": name}


@pytest.fixture(scope="module")
def spec(tiny_spec: ModelSpec) -> ModelSpec:
    """Inputs of all its layers are multiples of a block."""
    return dataclasses.replace(tiny_spec, cond_dim=64, pooled_dim=64)


# Weight bytes of the whole SD3-Medium, everything counted, against FP16's.
@pytest.mark.parametrize(
    ("schemes", "most"),
    [
        (everywhere("fp8"), 0.69),
        (everywhere("int8"), 0.69),
        ({**everywhere("fp8"), "modulation": "fp8-weights"}, 0.56),
        ({**everywhere("int8"), "modulation": "fp8-weights"}, 0.56),
        ({**everywhere("fp4"), "modulation": "fp8-weights"}, 0.41),
        ({**everywhere("w4a16"), "modulation": "fp8-weights"}, 0.41),
    ],
    ids=["fp8", "int8", "fp8-modulation", "int8-modulation", "fp4-modulation", "w4a16-modulation"],
)
def test_sd3_medium_takes_as_few_bytes_as_promised(schemes: dict[Role, str], most: float) -> None:
    spec = preset("sd3-medium")
    plan = plan_of(spec, **schemes)
    layout = planned_layout(spec, plan, {"format": "pt"})
    assert layout.total_bytes <= most * weights_layout(spec, torch.float16, {"format": "pt"}).total_bytes
    assert not any(key.startswith("padding.") for key in layout.tensors)
    by_call = planned_call_bytes(spec, plan)
    assert sum(by_call.values()) == sum(info.nbytes for info in layout.tensors.values())


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_plain_plan_makes_the_file_of_today_to_the_byte(
    name: str, family: str, tiny_families: dict[str, ModelSpec]
) -> None:
    spec, compute = tiny_families[family], precision(name)
    dtype, plan = getattr(torch, compute.dtype), PrecisionPlan(compute)
    assert planned_layout(spec, plan, {"format": "pt"}) == weights_layout(spec, dtype, {"format": "pt"})
    assert planned_call_bytes(spec, plan) == call_bytes(spec, compute)
    pairs = zip(stream_planned(spec, SOURCE, plan), stream_parts(spec, SOURCE, dtype), strict=True)
    assert all(ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) for ours, theirs in pairs)


SCHEMES_OF_ROLES: list[dict[Role, str]] = [
    {**everywhere("fp8"), "modulation": "fp8-weights", "embedders": "fp8-weights", "final": "fp8"},
    {"attention": "int8", "mlp": "fp8-token"},
    {"attention": "fp4", "mlp": "w4a16", "modulation": "w4a16"},
]


@pytest.mark.parametrize("schemes", SCHEMES_OF_ROLES, ids=["fp8", "int8", "4-bit"])
def test_the_file_is_written_opened_and_read_back(schemes: dict[Role, str], spec: ModelSpec, tmp_path: Path) -> None:
    attentions = {"blocks.1": (AttentionScales(8.0, 9.0, 10.0),)}
    plan = dataclasses.replace(plan_of(spec, **schemes), attentions=attentions)
    layout = planned_layout(spec, plan, {"format": "pt"})
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, layout, stream_planned(spec, SOURCE, plan))
    with safe_open(path, framework="pt") as opened:  # the library's own reader
        assert set(opened.keys()) == set(layout.tensors)
        assert opened.get_tensor("blocks.1.attention.0.q_scale").dtype == torch.float16
    with SafetensorsFile(path) as file:
        back = QuantizedWeights(spec, file, {p: q.scheme for p, q in plan.linears.items()}, "of a bundle")
        for parameter in parameters(spec):
            linear = parameter.path.removesuffix(".weight")
            exact = read_parameter(SOURCE, parameter, torch.float32)
            if linear in plan.linears and linear != parameter.path:
                tensors = quantize_weight(exact, plan.linears[linear], torch.float16)
                expected = dequantize(tensors, plan.linears[linear].scheme).reshape(parameter.shape)
                keys = [f"{linear}.{name}" for name in tensors if name != "weight"]
                assert all(torch.equal(file.read(k).float(), tensors[k.rpartition(".")[2]].float()) for k in keys)
            else:
                expected = exact.half().float()
            assert torch.equal(read_parameter(back, parameter, torch.float32), expected), parameter.path


@pytest.mark.parametrize("schemes", SCHEMES_OF_ROLES, ids=["fp8", "int8", "4-bit"])
def test_what_is_read_as_one_lies_in_one_span(schemes: dict[Role, str], spec: ModelSpec) -> None:
    plan = plan_of(spec, **schemes)
    tensors = planned_layout(spec, plan).tensors
    order = {key: i for i, key in enumerate(tensors)}
    for parameter in linears(spec).values():  # Q, K and V
        places = [order[part.key] for part in parameter.parts]
        assert places == list(range(places[0], places[0] + len(places)))
    modulations = {path: p for path, p in linears(spec).items() if role_of(path) == "modulation"}
    spans = [[part.key for p in modulations.values() for part in p.parts]]
    if "modulation" in schemes:
        by_name = "channel_scale" if schemes["modulation"] == "fp8-weights" else "weight_scale"
        spans.append([f"{path}.{by_name}" for path in modulations])
    for span in spans:
        places = [order[key] for key in span]
        assert places == list(range(places[0], places[0] + len(places)))
    assert all(info.offset % info.dtype.itemsize == 0 for info in tensors.values())


def test_odd_sizes_are_padded_to_the_alignment_of_what_follows(spec: ModelSpec, tmp_path: Path) -> None:
    odd = dataclasses.replace(spec, out_channels=1, patch_size=1, txt_dim=25, pooled_dim=25, cond_dim=27)
    plan = plan_of(odd, embedders="fp8-weights", modulation="fp8-weights", final="fp8")
    layout = planned_layout(odd, plan)
    assert any(key.startswith("padding.") for key in layout.tensors)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, layout, stream_planned(odd, SOURCE, plan))
    with SafetensorsFile(path) as file:
        assert all(info.offset % info.dtype.itemsize == 0 for info in file.tensors.values())


class Watched(RandomWeights):
    """Random weights that keep the keys that were asked for."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.asked: list[str] = []

    def part(self, part: Part) -> Tensor:
        self.asked.append(part.key)
        return super().part(part)


def test_a_parameter_is_read_once_and_when_it_is_written(spec: ModelSpec) -> None:
    source = Watched(4)
    keys = [part.key for parameter in parameters(spec) for part in parameter.parts]
    for key, _ in stream_planned(spec, source, plan_of(spec, attention="w4a16", mlp="fp4")):
        if key in keys:  # its parameter is the last that was read; Q, K and V are read as one
            ahead = source.asked[keys.index(key) + 1 :]
            assert key in source.asked and len(ahead) <= 2
    assert source.asked == keys


def test_a_layer_that_the_model_lacks_is_named(spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match=r"tiny has no linear layer blocks\.9\.img\.mlp\.up"):
        planned_layout(spec, PrecisionPlan(FP16, {"blocks.9.img.mlp.up": LinearPlan(SCHEMES["fp8"], 1.0)}))
