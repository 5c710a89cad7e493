"""`verify_bundle`: what it compares with, what it refuses, and what it says was not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from mmdit_deploy.bundle import open_bundle, read_manifest, write_manifest
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import BundleError, MachineError, UsageError
from mmdit_deploy.export import ExportRequest
from mmdit_deploy.machine import machine_facts
from mmdit_deploy.report import verdict_text
from mmdit_deploy.runtime import runnable_target
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import Case, Verdict, verify_against_weights


def _levels(verdict: Verdict) -> set[str]:
    return {check.level for check in verdict.checks}


def test_full_makes_the_random_weights_again(
    healthy: Callable[[str], Path], copy_of: Callable[[str], Any], plant: Callable[[Any, str], str]
) -> None:
    verdict = verify_bundle(healthy("fp16"), full=True)
    assert verdict.passed and verdict.reference == "the eager model in fp32"
    copy = copy_of("fp16")
    first = plant(copy, "streams exchanged")
    verdict = verify_bundle(copy.seal(), full=True)
    assert verdict.first_failure is not None and verdict.first_failure.name == first


def test_thorough_runs_more_shapes(healthy: Callable[[str], Path]) -> None:
    quick = verify_bundle(healthy("fp16"), full=True)
    thorough = verify_bundle(healthy("fp16"), full=True, thorough=True)
    assert thorough.passed
    assert {c.case for c in quick.checks} < {c.case for c in thorough.checks}


def test_progress_names_every_call(healthy: Callable[[str], Path]) -> None:
    said: list[tuple[str, int, int]] = []
    verify_bundle(healthy("fp16"), progress=lambda *args: said.append(args))
    assert [name for name, _, _ in said][:3] == ["conditioning", "img_embed", "txt_embed"]
    assert [(i, n) for _, i, n in said] == [(i, 11) for i in range(11)]


def test_thorough_alone_is_refused(healthy: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--thorough needs the weights") as error:
        verify_bundle(healthy("fp16"), thorough=True)
    assert "--full" in str(error.value)


def test_full_is_refused_for_weights_of_a_checkpoint(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp16")
    fields = dict(read_manifest(copy.path).fields)
    fields["weights"] = {"origin": "checkpoint /models/sd3", "random": False, "file": "weights.safetensors"}
    write_manifest(copy.path, fields)
    with pytest.raises(UsageError, match="--full makes random weights again") as error:
        verify_bundle(copy.path, full=True)
    assert "/models/sd3" in str(error.value) and "--checkpoint" in str(error.value)


def test_a_bundle_without_a_reference_says_what_to_do(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp16")
    (copy.path / "reference.safetensors").unlink()
    with pytest.raises(BundleError, match=r"needs the bundle's reference\.safetensors") as error:
        verify_bundle(copy.seal())
    assert "--checkpoint" in str(error.value) and "--no-verify" in str(error.value)
    assert verify_bundle(copy.path, full=True).passed


@pytest.mark.parametrize(
    ("target", "error"), [("tpu", UsageError), ("rtx:sm89", MachineError), ("ort-cuda", MachineError)]
)
def test_an_engine_that_the_bundle_lacks(healthy: Callable[[str], Path], target: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="ort-cpu"):
        verify_bundle(healthy("fp16"), target=target)


def test_the_whole_engine_is_skipped_where_memory_is_short(
    healthy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit_deploy.verify.whole.available_memory", lambda: 1000)
    verdict = verify_bundle(healthy("fp16"))
    assert verdict.passed  # the calls one by one are enough, and the verdict says that they are all
    assert _levels(verdict) == {"local", "cumulative", "output"}
    (item,) = verdict.not_executed
    assert item.startswith("the whole engine in one session: it needs about") and "0.0 GiB are available" in item
    assert not any("whole engine" in item for item in verdict.executed)
    text = verdict_text(verdict)
    assert "NOT executed" in text and "the whole engine in one session" in text.split("NOT executed")[-1]


def test_the_whole_engine_is_left_out_on_request(healthy: Callable[[str], Path]) -> None:
    verdict = verify_bundle(healthy("fp16"), whole=False)
    assert verdict.passed and "engine" not in _levels(verdict)
    assert "--blocks-only" in verdict.not_executed[0]


def test_emulation_is_called_emulation(healthy: Callable[[str], Path]) -> None:
    verdict = verify_bundle(healthy("bf16"))
    assert all("bf16 emulated" in item for item in verdict.executed)
    assert verdict.not_executed == ()
    assert not any("emulated" in item for item in verify_bundle(healthy("fp32")).executed)


def test_no_cases_are_no_verdict(copy_of: Callable[[str], Any]) -> None:
    verdict = copy_of("fp16").verify(cases=())
    assert verdict.checks == () and not verdict.passed


def test_the_weights_of_another_seed_do_not_match(copy_of: Callable[[str], Any]) -> None:
    engine = copy_of("fp32").engine()
    (verdict,) = verify_against_weights(engine, RandomWeights(4), [Case(1, 4, 4, 8, 500.0)])
    assert not verdict.passed
    assert verdict.first_failure is not None and verdict.first_failure.name == "conditioning"


def test_a_broken_bundle_is_refused_before_a_session_is_made(
    copy_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("no graph may be deserialized")

    copy = copy_of("fp16")
    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    monkeypatch.setattr("onnx.load", never)
    for path in sorted(copy.path.iterdir()):
        data = path.read_bytes()
        places = (0, len(data) // 2, len(data) - 1)
        if path.name == "manifest.json":  # all that it says of the files; the rest is not hashed
            names = (b'"format"', b'"sha256": "', b'"size": ')
            places = tuple(data.index(name) + len(name) - 1 for name in names)
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 0x01
            path.write_bytes(changed)
            with pytest.raises(BundleError):
                verify_bundle(copy.path)
        path.write_bytes(data)


@pytest.mark.parametrize("name", PRECISIONS)
def test_exposed_block_outputs_are_verified_too(
    quick_export: Callable[..., Any], tiny_spec: ModelSpec, tmp_path: Path, name: str
) -> None:
    ranges = {"batch": Range(1, 1, 1), "img_tokens": Range(4, 16, 16), "txt_tokens": Range(1, 8, 8)}
    request = ExportRequest(
        tiny_spec,
        RandomWeights(0),
        PRECISIONS[name],
        out=tmp_path / "b",
        ranges=ranges,
        outputs=("blocks.0",),
    )
    assert quick_export(request).verdicts[0].passed
    assert verify_bundle(tmp_path / "b").passed


def _with_engines(copy: Any, *names: str) -> Path:
    """The copy, said to have these engines too."""
    fields = dict(read_manifest(copy.path).fields)
    fields["engines"] = {**{name: {"graph": "model.ort.onnx"} for name in names}, **fields["engines"]}
    write_manifest(copy.path, fields)
    path: Path = copy.path
    return path


def test_blocks_only_takes_an_engine_that_can_be_stepped_through(
    copy_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that would run the TensorRT engine."""
    monkeypatch.setattr("mmdit_deploy.runtime.engines.check_runnable", lambda *_: None)
    path = _with_engines(copy_of("fp16"), "rtx:sm89")
    assert runnable_target(open_bundle(path)) == "rtx:sm89"
    assert verify_bundle(path, whole=False).target == "ort-cpu"


def test_blocks_only_falls_back_to_the_cpu(copy_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(bundle: object, target: str) -> None:
        if target == "ort-cuda":
            raise MachineError("no CUDA here")

    monkeypatch.setattr("mmdit_deploy.verification.check_runnable", check)
    assert verify_bundle(_with_engines(copy_of("fp16"), "ort-cuda"), whole=False).target == "ort-cpu"


def test_blocks_only_of_a_bundle_with_none_such_is_bad_input(copy_of: Callable[[str], Any]) -> None:
    copy = copy_of("fp16")
    fields = dict(read_manifest(copy.path).fields)
    fields["engines"] = {"rtx:sm89": {"graph": "model.onnx"}}
    write_manifest(copy.path, fields)
    with pytest.raises(UsageError, match="rtx:sm89 is run whole"):
        verify_bundle(copy.path, whole=False)


def test_what_it_ran_on_is_written_down(healthy: Callable[[str], Path], copy_of: Callable[[str], Any]) -> None:
    verdict = verify_bundle(healthy("fp16"))
    assert verdict.machine == machine_facts() == verdict.to_json()["machine"]
    assert verdict.machine["torch"] == torch.__version__ and verdict.machine["onnxruntime"]
    # A TensorRT engine that was built here and not run has run on nothing.
    built = copy_of("fp16").verify(record=object(), whole=False)
    assert not built.engine_executed and built.machine == {}
