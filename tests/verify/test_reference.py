"""`reference.safetensors`: enough to verify a bundle anywhere, in at most 16 MiB."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.errors import BundleError
from mmdit_deploy.export import ExportRequest
from mmdit_deploy.families import preset, with_residuals
from mmdit_deploy.model import calls
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth
from mmdit_deploy.spec import precision as named
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import Case, Reference, ReferenceRecorder, default_cases, reference
from mmdit_deploy.verify.cases import case_inputs
from mmdit_deploy.verify.reference import DIGEST_SIZE, MAX_BYTES, pick

SHAPE = (1, 256, 1536)  # one image of 256 tokens in the width of SD3


def test_a_healthy_bundle_passes_against_what_was_recorded(healthy: Callable[[str], Path], precision: str) -> None:
    verdict = verify_bundle(healthy(precision))
    assert verdict.passed
    assert "recorded in reference.safetensors" in verdict.reference
    assert verdict.weights == "random (seed 3)"
    names = {level: [c.name for c in verdict.checks if c.level == level] for level in ("local", "cumulative")}
    assert set(names["local"]) == {
        "conditioning", "img_embed", "txt_embed", "final_modulation",
        *(f"modulations.{i}.{stream}" for i in (0, 1) for stream in ("img", "txt")),
    }  # fmt: skip
    assert set(names["cumulative"]) == {"blocks.0", "blocks.1"}
    assert len([c for c in verdict.checks if c.level == "output"]) == 9


def test_it_needs_neither_weights_of_the_eager_model_nor_a_checkpoint(
    healthy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("the eager model must not run")

    monkeypatch.setattr("mmdit_deploy.verify.engine.EagerCalls", never)
    assert verify_bundle(healthy("fp16")).passed


def test_what_is_in_it(healthy: Callable[[str], Path]) -> None:
    path = healthy("fp16") / "reference.safetensors"
    assert path.stat().st_size <= MAX_BYTES == 16 * 2**20
    kept = Reference(path)
    manifest = json.loads((healthy("fp16") / "manifest.json").read_text())
    contract = Contract.from_json(manifest["contract"])
    assert kept.cases == default_cases(contract)
    for i, case in enumerate(kept.cases):
        expected = case_inputs(case, contract, ModelSpec.from_json(manifest["spec"]))
        inputs = kept.inputs(i)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert inputs["hidden_states"].dtype == torch.float16
        assert kept.sample(i).dtype == torch.float32
        assert kept.sample(i).shape[:2] == (case.batch, case.img_tokens)
        assert kept.digest(i, "blocks.1.img").shape == (DIGEST_SIZE,)
        assert torch.equal(kept.digest(i, "conditioning"), pick(kept.conditioning(i)))
    with pytest.raises(BundleError, match=r"case\.0\.blocks\.7"):
        kept.digest(0, "blocks.7")


def _recorder(depth: int, precision: str, cases: tuple[Case, ...] = (), **options: Any) -> ReferenceRecorder:
    """A recorder that was given everything of a model of full width; values do not matter for its size."""
    spec = from_depth(depth)
    compute = named(precision)
    contract = Contract.of(spec, compute)
    cases = cases or default_cases(contract, compute, **options)
    recorder = ReferenceRecorder(cases)
    recorder.inputs([case_inputs(case, contract, spec) for case in cases])
    digest = torch.zeros(DIGEST_SIZE)
    for i, case in enumerate(cases):
        for call in calls(spec):
            for name in call.outputs:
                sample = torch.zeros(case.batch, case.img_tokens, spec.out_dim)
                whole = {"sample": sample, "conditioning": torch.zeros(case.batch, spec.cond_dim)}
                recorder.outputs(i, [name], [whole.get(name, digest)])
    return recorder


@pytest.mark.parametrize(("depth", "compute"), [(24, "fp32"), (38, "fp16"), (128, "fp16"), (38, "fp8")])
def test_the_default_cases_of_real_models_fit(tmp_path: Path, depth: int, compute: str) -> None:
    assert _recorder(depth, compute).write(tmp_path) == (24 if named(compute).quantized else 9)
    assert (tmp_path / "reference.safetensors").stat().st_size <= MAX_BYTES


def test_cases_that_do_not_fit_are_left_out_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_INPUT_BYTES", MAX_BYTES)
    recorder = _recorder(24, "fp32", thorough=True)
    count = recorder.write(tmp_path)
    assert 9 <= count < 18
    assert (tmp_path / "reference.safetensors").stat().st_size <= MAX_BYTES
    kept = Reference(tmp_path / "reference.safetensors")
    assert len(kept.cases) == count
    assert kept.inputs(count - 1)["hidden_states"].shape[1] == kept.cases[-1].img_tokens
    kept.sample(count - 1)


def test_there_is_no_file_where_no_case_fits(tmp_path: Path) -> None:
    recorder = _recorder(2, "fp32", (Case(4, 128, 128, 512, 500.0),))  # its sample alone has 16.8 MB
    assert recorder.write(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_digest_moves_when_a_blocks_output_moves(
    healthy: Callable[[str], Path], copy_of: Callable[[str], Any], plant: Callable[[Any, str], str]
) -> None:
    copy = copy_of("fp32")
    plant(copy, "gate of the text MLP dropped")
    after = {c.name: c.errors for c in verify_bundle(copy.seal()).checks if c.level == "cumulative"}
    before = {c.name: c.errors for c in verify_bundle(healthy("fp32")).checks if c.level == "cumulative"}
    for name in ("blocks.0", "blocks.1"):
        assert after[name].rel_l2 > 1000 * before[name].rel_l2


@pytest.mark.parametrize("shape", [SHAPE, (2, 272, 1536), (1, 4096, 2432), (1, 1, 9216), (1, 16, 64), (1, 5)])
def test_a_digest_is_spread_over_tokens_and_channels(shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    index = torch.arange(numel, dtype=torch.float64).reshape(shape)
    # fp32 holds no index beyond 2^24: pick the low and the high part
    places = pick(index % 4096).double() + 4096 * pick(index // 4096).double()
    assert len(places) == DIGEST_SIZE
    channels = places % shape[-1]
    parts = min(24, shape[-1])  # e.g. the heads
    assert len((channels * parts // shape[-1]).unique()) == parts
    tokens = places // shape[-1]
    rows = numel // shape[-1]
    parts = min(24, rows)
    assert len((tokens * parts // rows).unique()) == parts


def test_the_error_of_a_digest_is_that_of_the_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(SHAPE, generator=generator)
    noisy = exact + 0.01 * torch.randn(SHAPE, generator=generator)
    estimate = (pick(noisy) - pick(exact)).norm() / pick(exact).norm()
    assert float(estimate) == pytest.approx(0.01, rel=0.25)


def test_a_broken_header_is_a_bundle_error(tmp_path: Path, copy_of: Callable[[str], Any]) -> None:
    path = copy_of("fp16").path / reference.FILE_NAME
    data = path.read_bytes()
    assert data.count(b'"cases"') == 1
    path.write_bytes(data.replace(b'"cases"', b'"casus"'))
    with pytest.raises(BundleError, match="lists its cases"):
        Reference(path)


def test_the_largest_inputs_are_made_again(
    quick_export: Callable[[ExportRequest], Any],
    tiny_families: Mapping[str, ModelSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ControlNet's residuals at real size would leave no room for a case."""
    spec = tiny_families["sd3-controlnet"]
    monkeypatch.setattr("mmdit_deploy.verify.reference.MAX_INPUT_BYTES", 5000)
    ranges = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(1, 8, 16)}
    path = quick_export(
        ExportRequest(spec, RandomWeights(0), PRECISIONS["fp16"], out=tmp_path / "b", ranges=ranges)
    ).path
    kept = Reference(path / "reference.safetensors")
    assert kept.cases and not any("block_controlnet_hidden_states" in kept.inputs(i) for i in range(len(kept.cases)))
    assert verify_bundle(path).passed


def test_a_controlnet_of_real_size_leaves_cases(tmp_path: Path) -> None:
    spec = with_residuals(preset("sd3.5-large"), 19)
    cases = default_cases(Contract.of(spec, PRECISIONS["fp16"]))[:1]
    recorder = ReferenceRecorder(cases)
    recorder.inputs([case_inputs(case, Contract.of(spec, PRECISIONS["fp16"]), spec) for case in cases])
    for name in ("conditioning", "sample"):
        recorder.outputs(0, [name], [torch.zeros(1, 256, 64)])
    assert recorder.write(tmp_path) == 1
