"""Engines in segments, and engines of several profiles: what is built, and that the segments are one chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.contract import Range, parse_profile
from mmdit_deploy.model import calls
from mmdit_deploy.runtime import engine_files
from mmdit_deploy.spec import ModelSpec

pytestmark = pytest.mark.usefixtures("tensorrt_rtx", "no_gpu")

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


@pytest.fixture
def built(exported: Callable[..., Any]) -> Callable[..., Any]:
    """A bundle for SM89 alone, not verified: ``built(segments=2)``."""
    return lambda **options: exported("rtx:sm89", verify=False, **options)


@pytest.mark.parametrize("segments", [2, 3])
def test_segments_are_one_chain(built: Callable[..., Any], deep_spec: ModelSpec, segments: int) -> None:
    made = built(segments=segments)
    contract = made.fields["contract"]
    parts = made.fields["engines"]["rtx:sm89"]["segments"]
    assert [p["file"] for p in parts] == [f"engines/rtx-sm89/segment-{i}.engine" for i in range(segments)]
    assert [path for p in parts for path in p["calls"]] == [call.path for call in calls(deep_spec)]
    assert all(p["calls"][0].startswith("modulations.") for p in parts[1:])  # cut in front of a block

    known = {t["name"]: t for t in contract["inputs"]}
    crossing: list[str] = []
    for part in parts:
        for tensor in part["inputs"]:
            assert tensor == known[tensor["name"]]  # the model's, or written before, with the same axes and type
        for tensor in part["outputs"]:
            assert tensor["name"] not in known  # once
            known[tensor["name"]] = tensor
        crossing += [t["name"] for t in part["outputs"]]
    assert all(known[t["name"]] == t for t in contract["outputs"])
    # What crosses is what the cuts are in front of, and the conditioning, made once.
    cuts = {p["calls"][0].split(".")[1] for p in parts[1:]}
    streams = {f"blocks.{int(cut) - 1}.{stream}" for cut in cuts for stream in ("img", "txt")}
    assert set(crossing) == streams | {"conditioning", "sample"}


@pytest.mark.parametrize("segments", [2, 3])
def test_what_is_built_is_in_the_bundle_and_can_be_opened_as_a_chain(built: Callable[..., Any], segments: int) -> None:
    made = built(segments=segments)
    bundle = open_bundle(made.path, verify=True)
    record, files = engine_files(bundle, "rtx:sm89")  # the runtime's own check of the chain
    assert len(record.segments) == len(files) == segments
    assert [file.stat().st_size for file in files] == [segment.nbytes for segment in record.segments]
    assert record.to_json() == made.result.engines["rtx:sm89"].to_json()
    names = {p.name for p in (made.path / "engines/rtx-sm89").iterdir()}
    assert names == {"build.log", "layers.json", *(f"segment-{i}.engine" for i in range(segments))}
    log = (made.path / "engines/rtx-sm89/build.log").read_text(encoding="utf-8")
    assert log.count("== rtx:sm89 segment") == segments
    said = [line.split(",")[0] for line in made.said if " to " in line and line.startswith("build:")]
    assert said == [f"build: rtx:sm89 segment {i + 1} of {segments}" for i in range(segments)]


@pytest.mark.parametrize("segments", [2, 3])
def test_cuts_cost_next_to_nothing(built: Callable[..., Any], segments: int) -> None:
    """Attentions are fused as before, and few kernels come on top: a modulation product for each segment."""
    whole, cut = (built(segments=n).result.engines["rtx:sm89"] for n in (1, segments))
    assert cut.fused_attentions == whole.fused_attentions == dict.fromkeys(BLOCKS, 1)
    assert whole.kernels <= cut.kernels <= whole.kernels + 4 * (segments - 1)
    assert all(sum(s.kernels_by_call.values()) == s.kernels for s in cut.segments)


def test_the_graph_of_a_segmented_engine_is_verified_like_any_other(exported: Callable[..., Any]) -> None:
    made = exported("rtx:sm89", segments=2)
    (verdict,) = made.result.verdicts
    assert verdict.passed and not verdict.engine_executed and made.fields["verified"] == []
    assert "built, not executed" in verdict.not_executed[0]


def test_an_exposed_block_at_a_cut_is_written_once(built: Callable[..., Any]) -> None:
    made = built(segments=3, outputs=("blocks.0", "blocks.2"))
    first, second, last = made.fields["engines"]["rtx:sm89"]["segments"]
    assert {t["name"] for t in first["outputs"]} == {"conditioning", "blocks.0", "blocks.0.txt"}
    assert {t["name"] for t in second["outputs"]} == {"blocks.1.img", "blocks.1.txt"}
    assert {t["name"] for t in last["outputs"]} == {"sample", "blocks.2"}
    engine_files(open_bundle(made.path), "rtx:sm89")


def test_several_profiles_are_several_plans(built: Callable[..., Any]) -> None:
    profiles = ("batch=1,img_tokens=16", "batch=2,img_tokens=4:16:48,txt_tokens=8")
    parsed = tuple(map(parse_profile, profiles))
    one, two = built(), built(profiles=parsed)
    entry = two.fields["engines"]["rtx:sm89"]
    assert (
        entry["profiles"]
        == two.fields["contract"]["profiles"]
        == [
            {"batch": [1, 1, 1], "img_tokens": [16, 16, 16], "txt_tokens": [2, 8, 16]},
            {"batch": [2, 2, 2], "img_tokens": [4, 16, 48], "txt_tokens": [8, 8, 8]},
        ]
    )
    assert entry["fused_attentions"] == dict.fromkeys(BLOCKS, 1)  # in the plan of each
    assert 1.5 < entry["kernels"]["total"] / one.result.engines["rtx:sm89"].kernels < 2.5
    assert any("kernels, 2 profiles, 3 of 3 attentions fused" in line for line in two.said)


def test_one_token_costs_kernels_and_is_warned_of(built: Callable[..., Any]) -> None:
    ranges = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(1, 8, 16)}
    dear, cheap = built(ranges=ranges), built(ranges={**ranges, "txt_tokens": Range(2, 8, 16)})
    warning = "warning: txt_tokens from 1 costs a TensorRT plan several kernels a block; from 2 it does not"
    assert warning in dear.said and not any(line.startswith("warning:") for line in cheap.said)
    assert dear.result.engines["rtx:sm89"].kernels > cheap.result.engines["rtx:sm89"].kernels
