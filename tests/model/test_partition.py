"""Cutting the model into segments: where, and how evenly."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping

import pytest

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import PRESETS, preset
from mmdit_deploy.model import calls
from mmdit_deploy.model.partition import call_bytes, call_of, partition
from mmdit_deploy.spec import PRECISIONS, ModelSpec


def spec_of(tiny: ModelSpec, depth: int) -> ModelSpec:
    return dataclasses.replace(tiny, depth=depth)


def blocks(segment: tuple[str, ...]) -> list[int]:
    return [int(path.split(".")[1]) for path in segment if path.startswith("blocks.")]


@pytest.mark.parametrize("name", PRESETS)
def test_the_bytes_of_the_calls_are_those_of_the_weights(name: str) -> None:
    spec = preset(name)
    for precision in PRECISIONS.values():
        weights = call_bytes(spec, precision)
        assert set(weights) == {call.path for call in calls(spec)}
        assert sum(weights.values()) == precision.itemsize * sum(p.numel for p in parameters(spec))


def test_a_table_of_positions_counts(tiny_spec: ModelSpec) -> None:
    fp32 = PRECISIONS["fp32"]
    table = call_bytes(dataclasses.replace(tiny_spec, pos_table=True), fp32)["img_embed"]
    assert table - call_bytes(tiny_spec, fp32)["img_embed"] == 4 * tiny_spec.max_img_tokens * tiny_spec.width


def test_the_call_of_a_parameter() -> None:
    assert call_of("blocks.3.img.attn_out.weight") == "blocks.3"
    assert call_of("modulations.12.txt.proj.bias") == "modulations.12.txt"
    assert call_of("conditioning.time.up.weight") == "conditioning"
    assert call_of("final_modulation.proj.weight") == "final_modulation"
    assert call_of("single_blocks.12.norm_q.weight") == "single_blocks.12"
    assert call_of("single_modulations.12.proj.bias") == "single_modulations.12"
    assert call_of("shared_modulation.single.proj.weight") == "shared_modulation.single"
    assert call_of("txt_embed.norm.weight") == "txt_embed"


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 5])
def test_segments_are_runs_of_calls_cut_in_front_of_blocks(tiny_spec: ModelSpec, segments: int) -> None:
    spec = spec_of(tiny_spec, 5)
    chain = calls(spec)
    parts = partition(chain, call_bytes(spec, PRECISIONS["fp16"]), segments)
    assert len(parts) == segments
    assert [path for part in parts for path in part] == [call.path for call in chain]
    assert parts[0][:3] == ("conditioning", "img_embed", "txt_embed")
    assert parts[-1][-2:] == ("final_modulation", "final")
    for part in parts:
        assert blocks(part)
        for i in blocks(part):
            assert {f"modulations.{i}.img", f"modulations.{i}.txt"} <= set(part)
    for part in parts[1:]:
        assert part[0].startswith("modulations.")


def test_segments_of_each_family_are_runs_of_calls_cut_in_front_of_blocks(
    tiny_families: Mapping[str, ModelSpec], family: str
) -> None:
    spec = tiny_families[family]
    chain = calls(spec)
    own = {call.path: call.block for call in chain}
    for segments in range(1, len(spec.block_names) + 1):
        parts = partition(chain, call_bytes(spec, PRECISIONS["fp16"]), segments)
        assert len(parts) == segments
        assert [path for part in parts for path in part] == [call.path for call in chain]  # each once, in order
        for part in parts:
            present = [path for path in part if path in spec.block_names]
            assert present and {own[path] for path in part} <= {None, *present}  # modulations go with their block
        for part in parts[1:]:
            assert own[part[0]] is not None  # what joins or splits the streams goes with the block before it


def test_flux_is_cut_among_joint_and_among_single_blocks(tiny_families: Mapping[str, ModelSpec]) -> None:
    spec = tiny_families["flux1"]
    first, second, third = partition(calls(spec), call_bytes(spec, PRECISIONS["fp16"]), 3)
    assert first[-1] == "blocks.0" and first[:4] == ("conditioning", "img_embed", "txt_embed", "positions")
    assert second[2:] == ("blocks.1", "join", "single_modulations.0", "single_blocks.0")
    assert third == (
        "single_modulations.1", "single_blocks.1", "single_modulations.2", "single_blocks.2", "single_modulations.3",
        "single_blocks.3", "split", "final_modulation", "final",
    )  # fmt: skip


def test_modulations_that_are_shared_are_made_before_the_first_block_that_reads_them(
    tiny_families: Mapping[str, ModelSpec],
) -> None:
    spec = tiny_families["flux2"]
    parts = partition(calls(spec), call_bytes(spec, PRECISIONS["fp16"]), 5)
    assert [[path for path in part if path.startswith("shared_modulation.")] for part in parts] == [
        ["shared_modulation.img", "shared_modulation.txt"], ["shared_modulation.single"], [], [], []
    ]  # fmt: skip


def test_the_names_of_outputs_do_not_move_the_cuts(tiny_spec: ModelSpec) -> None:
    spec = spec_of(tiny_spec, 4)
    weights = call_bytes(spec, PRECISIONS["fp16"])
    assert partition(calls(spec, ("blocks.1",)), weights, 2) == partition(calls(spec), weights, 2)


def test_the_largest_segment_is_as_small_as_can_be(tiny_spec: ModelSpec) -> None:
    """Against every way to cut, with weights drawn at random."""
    draw = random.Random(0)
    for _ in range(30):
        depth = draw.randint(1, 7)
        chain = calls(spec_of(tiny_spec, depth))
        weights = {call.path: draw.choice([0, 1, draw.randint(1, 9), draw.randint(1, 1000)]) for call in chain}
        starts = [i for i, call in enumerate(chain) if call.path.startswith("modulations.") and ".img" in call.path]
        for segments in range(1, depth + 1):
            ours = [sum(weights[p] for p in part) for part in partition(chain, weights, segments)]
            best = min(
                max(
                    sum(weights[call.path] for call in chain[a:b])
                    for a, b in itertools.pairwise((0, *cuts, len(chain)))
                )
                for cuts in itertools.combinations(starts[1:], segments - 1)
            )
            assert len(ours) == segments and max(ours) == best


def test_equal_blocks_are_shared_out_evenly() -> None:
    spec = preset("sd3.5-large")
    parts = partition(calls(spec), call_bytes(spec, PRECISIONS["fp16"]), 2)
    assert [len(blocks(part)) for part in parts] == [19, 19]


@pytest.mark.parametrize(("segments", "fix"), [(0, "--segments 1"), (-1, "--segments 1"), (3, "--segments 2")])
def test_there_are_at_most_as_many_segments_as_blocks(tiny_spec: ModelSpec, segments: int, fix: str) -> None:
    weights = call_bytes(tiny_spec, PRECISIONS["fp16"])
    with pytest.raises(UsageError, match="1 to 2 segments") as caught:
        partition(calls(tiny_spec), weights, segments)
    assert caught.value.received == str(segments)
    assert caught.value.fix is not None and caught.value.fix.startswith(fix)
