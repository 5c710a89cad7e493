"""`mmdit-bench`: what it reports, and what it refuses before it makes anything large. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdit_deploy.bundle import read_manifest, write_manifest
from mmdit_deploy.contract import Contract, Range
from mmdit_deploy.latency import time_interleaved
from mmdit_deploy.machine import machine_facts


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` fails at the first call, as on a machine without a C++ compiler, and says nothing."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch, "compile", lambda model: fail)


def test_the_report(run: Callable[..., Any], exported: tuple[Path, Any], no_compiler: None, tmp_path: Path) -> None:
    out = tmp_path / "new" / "latency.json"
    result = run("bench", exported[0], "--rounds", "3", "--json", "-o", out)
    assert result.status == 0, result.err
    data = result.json
    assert json.loads(out.read_text()) == data
    timings = {t["name"]: t for t in data["timings"]}
    assert set(timings) == {"ort-cpu", "eager"}
    for timing in timings.values():
        assert 0 < timing["p50_ms"] <= timing["p90_ms"] and timing["rounds"] == 3
    ratio = timings["ort-cpu"]["p50_ms"] / timings["eager"]["p50_ms"]
    assert data["ratios"] == {"ort-cpu / eager": pytest.approx(ratio)}
    assert data["not_run"] == {"torch.compile": "RuntimeError: no message"}
    assert data["case"] == {"batch": 1, "rows": 4, "cols": 4, "txt_tokens": 8, "timestep": 500.0}
    assert data["machine"] == machine_facts() and data["machine"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in result.err and "through casts" in timings["ort-cpu"]["how"]
    assert "torch.compile  not run: RuntimeError" in result.err


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_torch_compile_is_a_rival_where_there_is_a_compiler(
    run: Callable[..., Any], exported: tuple[Path, Any]
) -> None:
    result = run("bench", exported[0], "--rounds", "2", "--json")
    assert result.status == 0, result.err
    data = result.json
    if not data["not_run"]:
        assert set(data["ratios"]) == {"ort-cpu / eager", "ort-cpu / torch.compile"}


def test_sizes_are_chosen(run: Callable[..., Any], exported: tuple[Path, Any], no_compiler: None) -> None:
    sizes = ["--batch", "2", "--img-tokens", "12", "--txt-tokens", "5"]
    case = run("bench", exported[0], "--rounds", "1", "--json", *sizes).json["case"]
    assert (case["batch"], case["rows"] * case["cols"], case["txt_tokens"]) == (2, 12, 5)


@pytest.mark.parametrize(
    ("option", "size", "words"),
    [
        ("--batch", "3", "batch must be 1 to 2"),
        ("--img-tokens", "49", "img_tokens must be 4 to 48"),
        ("--img-tokens", "1000000000000", "img_tokens must be 4 to 48"),
        ("--txt-tokens", "17", "txt_tokens must be 1 to 16"),
        ("--batch", "0", "--batch is at least 1"),
        ("--img-tokens", "-4", "--img-tokens is at least 1"),
        ("--rounds", "0", "--rounds is at least 1"),
    ],
)
def test_sizes_out_of_range_are_refused_before_anything_is_made(
    run: Callable[..., Any],
    exported: tuple[Path, Any],
    option: str,
    size: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmdit_deploy.latency.bundle.case_inputs", lambda *_: pytest.fail("said too late"))
    run("bench", exported[0], option, size).refused(2, words)


def test_sizes_in_no_profile_of_an_engine_are_refused_before_anything_is_made(
    run: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine would refuse by itself, only after its rivals were compiled."""
    contract = Contract.from_json(read_manifest(bundle).fields["contract"])
    profiles = tuple({**contract.ranges, "img_tokens": Range(n, n, n)} for n in (12, 48))
    monkeypatch.setattr("mmdit_deploy.latency.bundle.engine_files", lambda *_: (SimpleNamespace(profiles=profiles), []))
    monkeypatch.setattr("mmdit_deploy.latency.bundle.check_runnable", lambda *_: pytest.fail("said too late"))
    monkeypatch.setattr("mmdit_deploy.latency.bundle.case_inputs", lambda *_: pytest.fail("said too late"))
    arguments = ("--engine", "rtx:sm89", "--img-tokens", "16")
    run("bench", bundle, *arguments).refused(2, "within one profile of the engine", "img_tokens=16")


def test_sizes_that_are_not_chosen_are_those_of_a_profile(
    run: Callable[..., Any], bundle: Path, no_compiler: None
) -> None:
    """Not of the ranges, whose optima need not lie in one."""
    fields = dict(read_manifest(bundle).fields)
    sizes = [{"batch": [b, b, b], "img_tokens": [n, n, n], "txt_tokens": [2, 3, 4]} for b, n in ((1, 12), (2, 48))]
    fields["contract"] = {**fields["contract"], "profiles": sizes}
    write_manifest(bundle, fields)
    for given, expected in (((), (1, 12, 3)), (("--batch", "2"), (2, 48, 3))):
        case = run("bench", bundle, "--rounds", "1", "--json", *given).json["case"]
        assert (case["batch"], case["rows"] * case["cols"], case["txt_tokens"]) == expected


def test_image_tokens_that_no_image_has_are_refused(
    run: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit_deploy.latency.bundle.case_inputs", lambda *_: pytest.fail("said too late"))
    fields = dict(read_manifest(bundle).fields)
    ranges = {**fields["contract"]["ranges"], "img_tokens": [4, 16, 96]}
    fields["contract"] = {**fields["contract"], "ranges": ranges, "profiles": []}
    write_manifest(bundle, fields)
    run("bench", bundle, "--img-tokens", "89").refused(2, "72 × 72", "89 image tokens", "88")


def test_an_engine_that_the_bundle_lacks(run: Callable[..., Any], exported: tuple[Path, Any]) -> None:
    run("bench", exported[0], "--engine", "rtx:sm89").refused(3, "ort-cpu", "--target rtx:sm89")
    run("bench", exported[0], "--engine", "rtx:sm90").refused(2, "sm90", "--target trt")
    run("bench", exported[0], "--engine", "ort-cuda").refused(3, "ort-cpu", "--target ort-cuda")


def test_engines_on_different_devices_are_not_timed_together(run: Callable[..., Any], bundle: Path) -> None:
    fields = dict(read_manifest(bundle).fields)
    fields["engines"] = {target: fields["engines"]["ort-cpu"] for target in ("ort-cuda", "ort-cpu")}
    write_manifest(bundle, fields)
    arguments = ("--engine", "ort-cuda", "--engine", "ort-cpu")
    run("bench", bundle, *arguments).refused(2, "ort-cuda on cuda, ort-cpu on cpu", "two runs")


def test_an_eager_model_that_does_not_fit_is_not_loaded(
    run: Callable[..., Any], exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit_deploy.latency.bundle.available_memory", lambda: 1000)
    monkeypatch.setattr("mmdit_deploy.latency.bundle.MMDiT", lambda _: pytest.fail("it was loaded"))
    result = run("bench", exported[0], "--rounds", "1", "--json")
    assert result.status == 0, result.err
    data = result.json
    assert [t["name"] for t in data["timings"]] == ["ort-cpu"] and data["ratios"] == {}
    assert set(data["not_run"]) == {"eager", "torch.compile"}
    assert "of memory, and 0.0 GB are available" in data["not_run"]["eager"]


def test_rivals_take_turns_and_short_ones_are_settled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(10**6))
    monkeypatch.setattr("mmdit_deploy.latency.timing.time.perf_counter", lambda: next(clock) * 1e-3)
    rivals = {name: (name, lambda name=name: calls.append(name)) for name in ("a", "b")}
    timings = time_interleaved(rivals, torch.device("cpu"), rounds=3, warmup=1)
    assert "".join(calls) == "ab" + 3 * "aabb"
    assert [(t.name, t.p50_ms, t.p90_ms, t.rounds) for t in timings] == [
        ("a", pytest.approx(1.0), pytest.approx(1.0), 3),
        ("b", pytest.approx(1.0), pytest.approx(1.0), 3),
    ]
    calls.clear()
    monkeypatch.setattr("mmdit_deploy.latency.timing.time.perf_counter", lambda: next(clock) * 1.0)
    time_interleaved(rivals, torch.device("cpu"), rounds=3, warmup=0)
    assert "".join(calls) == 3 * "ab"  # a call of a second is timed as it comes
