"""The other families from end to end: exported and verified, opened again from the bundle alone, and run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.build import RTX
from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.cli import bench as bench_command
from mmdit_deploy.cli import inspect as inspect_command
from mmdit_deploy.cli import verify as verify_command
from mmdit_deploy.contract import TOKENS
from mmdit_deploy.errors import ContractError, UsageError
from mmdit_deploy.export import ExportRequest
from mmdit_deploy.export.request_checks import check_request
from mmdit_deploy.model import MMDiT, calls
from mmdit_deploy.runtime import Engine, engine_files
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import TOLERANCES, Case, compare, within
from mmdit_deploy.verify.cases import case_inputs

pytestmark = pytest.mark.usefixtures("no_gpu", "single_thread")

CASE = Case(2, 5, 7, 9, timestep=321.0)  # none of those that an export verifies
SEGMENTS = {"flux1": 3, "flux2": 3, "qwen-image": 2, "qwen-image-edit-2511": 2, "sd3-controlnet": 2}
OUTPUTS = {"flux1": ("blocks.1", "single_blocks.0")}
# What crosses each cut for the first time.
CROSSING = {
    "flux1": ({"conditioning", "cos", "sin", "blocks.0.img", "blocks.0.txt"}, {"single_blocks.0"}),
    "flux2": (
        {
            "conditioning",
            "cos",
            "sin",
            "shared_modulation.img",
            "shared_modulation.txt",
            "blocks.0.img",
            "blocks.0.txt",
        },
        {"shared_modulation.single", "join"},
    ),
    "qwen-image": ({"conditioning", "cos", "sin", "attention_mask", "blocks.0.img", "blocks.0.txt"},),
    "qwen-image-edit-2511": (
        {"conditioning", "cos", "sin", "attention_mask", "references", "blocks.0.img", "blocks.0.txt"},
    ),
    "sd3-controlnet": ({"conditioning", "residuals.1", "blocks.1.img", "blocks.1.txt"},),
}
TENSORS = {
    "cos": ("float32", (TOKENS, 16)),
    "sin": ("float32", (TOKENS, 16)),
    "attention_mask": ("float16", ("batch", 1, 1, TOKENS)),
    "references": ("bool", ("img_tokens", 1)),
    "residuals.1": ("float16", ("batch", "img_tokens", 64)),
    "shared_modulation.img": ("float16", ("batch", 1, 6 * 64)),
    "shared_modulation.txt": ("float16", ("batch", 1, 6 * 64)),
    "shared_modulation.single": ("float16", ("batch", 1, 3 * 64)),
    "join": ("float16", ("batch", TOKENS, 64)),
    "single_blocks.0": ("float16", ("batch", TOKENS, 64)),
    **{
        f"blocks.{i}.{stream}": ("float16", ("batch", f"{stream}_tokens", 64))
        for i in (0, 1)
        for stream in ("img", "txt")
    },
}
_TEXT = {"encoder_hidden_states": ("float16", ["batch", "txt_tokens", 24]), "timestep": ("float32", ["batch"])}
_POOLED = {"pooled_projections": ("float16", ["batch", 20])}
_GUIDANCE = {"guidance": ("float32", ["batch"])}
_MASK = {"encoder_hidden_states_mask": ("bool", ["batch", "txt_tokens"])}


def _ids(axes: int, *streams: str) -> dict[str, tuple[str, list[str | int]]]:
    return {f"{stream}_ids": ("float32", [f"{stream}_tokens", axes]) for stream in streams}


INPUTS = {
    "flux1": {**_TEXT, **_POOLED, **_GUIDANCE, **_ids(3, "img", "txt")},
    "flux2": {**_TEXT, **_GUIDANCE, **_ids(4, "img", "txt")},
    "qwen-image": {**_TEXT, **_MASK, **_ids(3, "img", "txt")},
    "qwen-image-edit-2511": {**_TEXT, **_MASK, **_ids(3, "img", "txt")},
    "sd3-controlnet": {
        **_TEXT,
        **_POOLED,
        **_ids(2, "img"),
        "block_controlnet_hidden_states": ("float16", [2, "batch", "img_tokens", 64]),
    },
}
Families = Mapping[str, ModelSpec]


@pytest.fixture(scope="session")
def bundle_of(export_once: Callable[..., Any], tiny_families: Families) -> Callable[[str], Any]:
    """An fp16 bundle of a family for ONNX Runtime, and in segments for TensorRT-RTX where that is installed."""

    def make(family: str) -> Any:
        targets = ("ort-cpu", "rtx:sm89") if RTX.installed else ("ort-cpu",)
        segments = SEGMENTS[family] if RTX.installed else None
        return export_once(tiny_families[family], *targets, segments=segments, outputs=OUTPUTS.get(family, ()))

    return make


def inputs_of(bundle: Path, **changes: Tensor) -> dict[str, Tensor]:
    opened = open_bundle(bundle)
    return {**case_inputs(CASE, opened.contract, opened.spec), **changes}


def test_the_export_is_verified_and_again_from_the_bundle_alone(
    bundle_of: Callable[[str], Any], tiny_families: Families, family: str
) -> None:
    made = bundle_of(family)
    assert all(verdict.passed for verdict in made.result.verdicts) and made.fields["verified"] == ["ort-cpu"]
    assert open_bundle(made.path).spec == tiny_families[family]
    again = verify_bundle(made.path)
    assert again.passed and "recorded in reference.safetensors" in again.reference
    assert {check.name for check in again.checks} >= {call.path for call in calls(tiny_families[family])[:-1]}


@pytest.mark.parametrize(("of", "precision"), [("flux1", "bf16"), ("qwen-image", "fp32")])
def test_other_precisions(export_once: Callable[..., Any], tiny_families: Families, of: str, precision: str) -> None:
    made = export_once(tiny_families[of], "ort-cpu", precision=precision)
    (verdict,) = made.result.verdicts
    assert verdict.passed and ("bf16 emulated" in verdict.executed[0]) == (precision == "bf16")
    assert verify_bundle(made.path).passed
    with Engine.load(made.path) as engine:
        sample = engine(inputs_of(made.path))["sample"]
    assert sample.shape == (2, 35, 10) and sample.dtype == getattr(torch, open_bundle(made.path).precision.dtype)


def test_the_engine_computes_what_the_eager_model_computes(
    bundle_of: Callable[[str], Any], eager_model: Callable[..., MMDiT], tiny_families: Families, family: str
) -> None:
    path = bundle_of(family).path
    inputs = inputs_of(path)
    outputs = OUTPUTS.get(family, ())
    with torch.inference_mode():
        wide = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
        eager = eager_model(tiny_families[family], RandomWeights(0))(**wide, outputs=outputs)
    expected = dict(zip(("sample", *outputs), eager if outputs else (eager,), strict=True))
    with Engine.load(path) as engine:
        received = engine(inputs)
    assert list(received) == list(expected)
    for name, tensor in received.items():
        assert tensor.shape == expected[name].shape and tensor.dtype == torch.float16
        assert within(compare(tensor, expected[name]), TOLERANCES["fp16"]), name


def test_joined_tokens_are_an_output_of_a_single_block(bundle_of: Callable[[str], Any]) -> None:
    """Image before text: a caller that wants the image's takes the first."""
    path = bundle_of("flux1").path
    (output,) = [t for t in open_bundle(path).contract.outputs if t.name == "single_blocks.0"]
    assert output.axes == ("batch", TOKENS, 64)
    with Engine.load(path) as engine:
        received = engine(inputs_of(path))
        assert received["single_blocks.0"].shape == (2, 5 * 7 + 9, 64)
        given = torch.empty(2, 44, 64, dtype=torch.float16)
        engine(inputs_of(path), outputs={"single_blocks.0": given})
        assert torch.equal(given, received["single_blocks.0"])
        with pytest.raises(ContractError, match=r"single_blocks\.0 is contiguous, and float16 \[2, 44, 64\]"):
            engine(inputs_of(path), outputs={"single_blocks.0": given[:, :35]})


def test_an_output_that_is_none_of_the_blocks_is_refused(tiny_families: Families) -> None:
    for outputs in (("single_blocks.4",), ("single_blocks.0", "single_blocks.0"), ("join",)):
        request = ExportRequest(tiny_families["flux1"], RandomWeights(0), PRECISIONS["fp16"], outputs=outputs)
        with pytest.raises(UsageError, match=r"blocks\.1, single_blocks\.0 to single_blocks\.3, each once"):
            check_request(request)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "qwen-image",
            {"encoder_hidden_states_mask": torch.ones(2, 9)},
            ("encoder_hidden_states_mask is bool", "float32", "convert it to bool"),
        ),
        (
            "qwen-image",
            {"encoder_hidden_states_mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)},
            ("encoder_hidden_states_mask has the axes [batch, txt_tokens]", "[2, 1, 1, 9]", "reshape it"),
        ),
        (
            "flux1",
            {"txt_ids": torch.zeros(8, 3)},
            ("txt_tokens is one size in all tensors", "9 in encoder_hidden_states, 8 in txt_ids", "make them equal"),
        ),
        ("flux1", {"guidance": torch.tensor([3.5])}, ("batch is one size", "2 in hidden_states, 1 in guidance")),
        (
            "flux2",
            {"img_ids": torch.zeros(35, 3)},
            ("img_ids has the axes [img_tokens, 4]", "[35, 3]", "axis 1 must be 4"),
        ),
        (
            "sd3-controlnet",
            {"block_controlnet_hidden_states": torch.zeros(3, 2, 35, 64, dtype=torch.float16)},
            ("block_controlnet_hidden_states has the axes [2, batch, img_tokens, 64]", "its axis 0 must be 2"),
        ),
        ("sd3-controlnet", {"guidance": torch.ones(2)}, ("the inputs are hidden_states, ", "unknown ['guidance']")),
    ],
)
def test_a_wrong_input_is_named_with_its_rule_and_fix(
    bundle_of: Callable[[str], Any], family: str, changes: dict[str, Tensor], words: tuple[str, ...]
) -> None:
    path = bundle_of(family).path
    with Engine.load(path) as engine, pytest.raises(ContractError) as caught:
        engine(inputs_of(path, **changes))
    assert caught.value.exit_status == 2 and caught.value.fix
    assert all(word in str(caught.value) for word in words), caught.value


def test_segments_are_a_chain(
    tensorrt_rtx: Any, bundle_of: Callable[[str], Any], tiny_families: Families, family: str
) -> None:
    made, spec = bundle_of(family), tiny_families[family]
    record, files = engine_files(open_bundle(made.path), "rtx:sm89")  # the runtime's own check of the chain
    assert len(files) == len(record.segments) == SEGMENTS[family]
    assert [path for segment in record.segments for path in segment.calls] == [call.path for call in calls(spec)]
    assert record.fused_attentions == dict.fromkeys(spec.block_names, 1)
    contract = open_bundle(made.path).contract
    outside = {t.name for t in (*contract.inputs, *contract.outputs)}
    *before, last = record.segments
    for segment, expected in zip(before, CROSSING[family], strict=True):
        later = {t.name: t for other in record.segments for t in other.inputs}
        crossing = {t.name: t for t in segment.outputs if t.name in later}
        assert set(crossing) == expected and {t.name for t in segment.outputs} <= expected | outside
        assert all(later[name] == tensor for name, tensor in crossing.items())
        rows = "batch + batch" if spec.still_references else "batch"  # at its own timestep, and at timestep 0
        for name, tensor in crossing.items():
            assert (tensor.dtype, tensor.axes) == {**TENSORS, "conditioning": ("float16", (rows, 40))}[name], name
    assert {t.name for t in last.outputs} <= outside


def test_bench_runs_the_eager_model_beside_it(
    bundle_of: Callable[[str], Any],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: None)  # which cannot be called: eager is rival enough
    assert bench_command.main([str(bundle_of(family).path), "--engine", "ort-cpu", "--rounds", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {timing["name"] for timing in data["timings"]} == {"ort-cpu", "eager"}
    assert data["ratios"].keys() == {"ort-cpu / eager"} and list(data["not_run"]) == ["torch.compile"]


def test_inspect_says_what_goes_in(
    bundle_of: Callable[[str], Any], tiny_families: Families, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, spec = bundle_of(family).path, tiny_families[family]
    assert inspect_command.main([str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert ModelSpec.from_json(data["spec"]) == spec
    inputs = {tensor["name"]: (tensor["dtype"], tensor["axes"]) for tensor in data["contract"]["inputs"]}
    assert inputs == {"hidden_states": ("float16", ["batch", "img_tokens", spec.img_dim]), **INPUTS[family]}
    assert f"bundle {path}: {spec.name}, fp16" in err and all(name in err for name in inputs)


def test_inspect_counts_kernels_of_single_blocks(
    tensorrt_rtx: Any, bundle_of: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle_of("flux2").path
    assert inspect_command.main([str(path)]) == 0
    assert "fused, 5 kernels in 5 blocks" in (said := capsys.readouterr().out)
    assert "single_blocks." in next(line for line in said.splitlines() if line.strip().startswith("by call"))
    assert inspect_command.main([str(path / "engines/rtx-sm89/segment-2.engine")]) == 0
    said = capsys.readouterr().out
    assert "single_blocks.0 … final" in said and f"[batch, {TOKENS}, 64]" in said  # its calls, and what it reads


def test_verify_command(bundle_of: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_command.main([str(bundle_of("flux2").path), "--engine", "ort-cpu", "--full"]) == 0
    assert "PASS" in capsys.readouterr().out
