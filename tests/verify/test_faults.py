"""A wrong engine is never within tolerance, and the first call that is wrong is known by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmdit_deploy.errors import GraphError
from mmdit_deploy.model import calls
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import Verdict


def test_a_healthy_engine_passes(copy_of: Callable[[str], Any], precision: str) -> None:
    verdict = copy_of(precision).verify()
    assert verdict.passed and verdict.first_failure is None
    # 11 calls in 2 cases, of which the last one's chain is the output
    levels = [check.level for check in verdict.checks]
    assert {level: levels.count(level) for level in levels} == {
        "local": 22, "cumulative": 20, "output": 2, "engine": 2
    }  # fmt: skip
    binding = {check.level for check in verdict.checks if check.binding}
    assert binding == {"local", "output", "engine"}


# Exports of each family in fp16 are verified in tests/export/test_export_families.py; bf16 takes twice as long.
@pytest.mark.parametrize("compute", [p if p == "fp32" else pytest.param(p, marks=pytest.mark.soak) for p in PRECISIONS])
def test_a_healthy_engine_of_each_family_passes(
    copy_of: Callable[..., Any], tiny_families: Mapping[str, ModelSpec], family: str, compute: str
) -> None:
    verdict = copy_of(compute, family).verify()
    assert verdict.passed and verdict.first_failure is None
    local = [check.name for check in verdict.checks if check.level == "local"]
    assert local == [call.path for call in calls(tiny_families[family]) for _ in range(2)]  # in both cases


def test_a_fault_is_rejected_and_named(
    planted: Callable[[str, str], tuple[Any, str]], fault: str, precision: str
) -> None:
    copy, first = planted(fault, precision)
    verdict = copy.verify(whole=False)  # what is stepped through must be enough: an engine may not run here
    assert not verdict.passed
    failure = verdict.first_failure
    assert failure is not None and (failure.name, failure.level) == (first, "local"), fault


def test_a_fault_is_rejected_without_the_checkpoint(
    planted: Callable[[str, str], tuple[Any, str]], replayed: Callable[[Any], Verdict], fault: str, precision: str
) -> None:
    copy, first = planted(fault, precision)
    failure = replayed(copy).first_failure
    # the own error of a block, and of what comes after one, is not known without the weights: the final output tells
    later = first.startswith(("blocks.", "single_blocks.", "join", "split", "final"))
    expected = ("sample", "output") if later else (first, "local")
    assert failure is not None
    assert failure.errors.nonfinite or (failure.name, failure.level) == expected, fault


def test_a_fault_is_rejected_where_the_whole_engine_does_not_fit(
    copy_of: Callable[[str], Any], plant: Callable[[Any, str], str]
) -> None:
    copy = copy_of("fp16")
    first = plant(copy, "streams exchanged")
    verdict = copy.verify(whole=False)
    assert not verdict.passed and verdict.first_failure.name == first
    assert not [check for check in verdict.checks if check.level == "engine"]


def test_only_the_faulty_call_is_out_of_tolerance(
    copy_of: Callable[[str], Any], plant: Callable[[Any, str], str]
) -> None:
    copy = copy_of("fp32")
    plant(copy, "gate of the attention dropped")
    out = {check.name for check in copy.verify().checks if check.level == "local" and not check.passed}
    assert out == {"blocks.0"}  # blocks.1 is right: on equal inputs it gives equal outputs


def miswire(copy: Any, call: str, position: int, value: str) -> None:
    """Let a call read another value, as it is between calls: where bf16 is emulated, in fp32."""

    def change(model: onnx.ModelProto) -> None:
        names = {v for node in model.graph.node for v in (*node.input, *node.output)}
        wide = [v for v in (f"{value}.fp32", value) if v in names]
        next(n for n in model.graph.node if n.name == call).input[position] = wide[0]

    copy.edit_graph(change)


@pytest.mark.parametrize(
    ("call", "position", "value", "message"),
    [
        ("blocks.1", 2, "modulations.0.img", r"blocks\.1 must read modulations\.1\.img"),
        ("blocks.1", 0, "img_embed", r"blocks\.1 must read blocks\.0\.img, made by output 0 of blocks\.0"),
        ("final", 0, "blocks.0.img", r"final must read blocks\.1\.img"),
        ("modulations.1.txt", 0, "hidden_states", r"modulations\.1\.txt must read conditioning"),
        ("txt_embed", 0, "hidden_states", r"txt_embed must read encoder_hidden_states, made by the caller"),
    ],
)
def test_a_miswired_call_is_refused_by_name(
    copy_of: Callable[[str], Any], precision: str, call: str, position: int, value: str, message: str
) -> None:
    copy = copy_of(precision)
    miswire(copy, call, position, value)
    with pytest.raises(GraphError, match=message):
        copy.verify(whole=False)


@pytest.mark.parametrize(
    ("of", "call", "position", "value", "message"),
    [
        ("flux1", "positions", 1, "img_ids", r"positions must read txt_ids, made by the caller"),
        ("flux1", "blocks.1", 4, "sin", r"blocks\.1 must read cos, made by output 0 of positions"),
        ("flux1", "join", 1, "blocks.0.txt", r"join must read blocks\.1\.txt"),
        ("flux1", "single_blocks.1", 1, "single_modulations.0", r"single_blocks\.1 must read single_modulations\.1"),
        ("flux1", "split", 0, "single_blocks.1.tokens", r"split must read single_blocks\.3\.tokens"),
        ("flux2", "blocks.1", 2, "shared_modulation.txt", r"blocks\.1 must read shared_modulation\.img"),
        ("flux2", "single_blocks.2", 1, "final_modulation", r"single_blocks\.2 must read shared_modulation\.single"),
        ("qwen-image", "attention_mask", 1, "txt_ids", r"attention_mask must read img_ids"),
        ("qwen-image", "blocks.1", 6, "cos", r"blocks\.1 must read attention_mask"),
        ("qwen-image-edit-2511", "blocks.0", 7, "img_ids", r"blocks\.0 must read references"),
        # Four blocks share two residuals: one further, and one less far.
        ("sd3-controlnet", "blocks.1", 4, "residuals.1", r"blocks\.1 must read residuals\.0, made by output 0 of res"),
        ("sd3-controlnet", "blocks.2", 4, "residuals.0", r"blocks\.2 must read residuals\.1, made by output 1 of res"),
    ],
)
def test_a_miswired_call_of_a_family_is_refused_by_name(
    copy_of: Callable[..., Any], of: str, call: str, position: int, value: str, message: str
) -> None:
    copy = copy_of("fp16", of)
    miswire(copy, call, position, value)
    with pytest.raises(GraphError, match=message):
        copy.verify(whole=False)


def test_a_wrong_output_is_refused(copy_of: Callable[[str], Any]) -> None:
    def swap(model: onnx.ModelProto) -> None:
        block = next(n for n in model.graph.node if n.name == "blocks.0")
        block.output[0], block.output[1] = block.output[1], block.output[0]

    copy = copy_of("fp32")
    copy.edit_graph(swap)
    with pytest.raises(GraphError, match=r"blocks\.1 must read blocks\.0\.img"):
        copy.verify()


def test_a_call_that_is_missing_is_refused(copy_of: Callable[[str], Any]) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.name == "modulations.1.img").name = "another"

    copy = copy_of("fp32")
    copy.edit_graph(rename)
    with pytest.raises(GraphError, match=r"modulations\.1\.img"):
        copy.verify()


def test_the_faults_are_not_in_the_healthy_bundle(healthy: Callable[[str], Path], precision: str) -> None:
    assert verify_bundle(healthy(precision)).passed
