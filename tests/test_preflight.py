"""The preflight: what an export will need, and the refusal, with figures, where this machine has no room for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmdit_deploy.build import check_targets
from mmdit_deploy.contract import Contract, parse_profile
from mmdit_deploy.errors import MachineError, UsageError
from mmdit_deploy.families import preset
from mmdit_deploy.precision import QuantizationRecipe
from mmdit_deploy.precision.structure import structure
from mmdit_deploy.preflight import Plan, Stage, check_plan, estimates, make_plan, rough_time
from mmdit_deploy.spec import PRECISIONS, ModelSpec, from_depth, precision

GIB = 2**30
LARGE = preset("sd3.5-large")


pytestmark = pytest.mark.usefixtures("room_for_large_models")


def plan_of(
    targets: Sequence[str] = ("rtx:sm89",),
    *,
    spec: ModelSpec = LARGE,
    precision: str = "fp16",
    memory: int | None = 24 * GIB,
    profiles: Sequence[str] = (),
    from_checkpoint: bool = True,
    **kwargs: Any,
) -> Plan:
    compute = PRECISIONS[precision]
    contract = Contract.of(spec, compute, profiles=[parse_profile(text) for text in profiles])
    return make_plan(
        spec,
        compute,
        contract,
        check_targets(targets, compute),
        memory=memory,
        from_checkpoint=from_checkpoint,
        **kwargs,
    )


def refusal(plan: Plan, directory: Path) -> MachineError:
    with pytest.raises(MachineError) as caught:
        check_plan(plan, directory)
    assert caught.value.exit_status == 3 and caught.value.received and caught.value.fix
    assert not directory.exists()
    return caught.value


def build_of(plan: Plan) -> Stage:
    (stage,) = [s for s in plan.stages if s.name.startswith("build")]
    return stage


def test_the_figures_of_the_model() -> None:
    plan = plan_of(("ort-cpu", "rtx:sm89"))
    assert plan.parameters / 1e9 == pytest.approx(8.06, rel=0.005)
    assert plan.weights_bytes == pytest.approx(2 * plan.parameters, rel=0.001)
    assert plan.disk_bytes == pytest.approx(2.02 * plan.weights_bytes, rel=0.01)
    assert plan.disk_bytes == sum(s.disk_bytes for s in plan.stages)
    assert plan.memory_bytes == max(s.memory_bytes for s in plan.stages)
    assert plan.seconds == sum(s.seconds for s in plan.stages)


@pytest.mark.parametrize(
    ("memory", "fewest", "most"), [(64 * GIB, 1, 1), (24 * GIB, 2, 3), (6 * 10**9, 6, 12), (4 * 10**9, 12, 38)]
)
def test_as_many_segments_as_the_memory_asks_for(memory: int, fewest: int, most: int, tmp_path: Path) -> None:
    plan = plan_of(memory=memory)
    assert fewest <= plan.segments["rtx:sm89"] <= most
    stage = build_of(plan)
    assert stage.memory_bytes + stage.mapped_bytes <= memory
    assert not plan.warnings
    check_plan(plan, tmp_path / "b")


def test_no_fewer_segments_would_do() -> None:
    count = plan_of(memory=6 * 10**9).segments["rtx:sm89"]
    stage = build_of(plan_of(memory=6 * 10**9, segments=count - 1))
    assert stage.memory_bytes + stage.mapped_bytes > 0.9 * 6e9


@pytest.mark.parametrize(
    ("name", "billions", "segments"),
    [("flux1-dev", 11.90, 3), ("qwen-image", 20.43, 5), ("flux2-dev", 32.22, 8)],
)
def test_the_figures_of_the_other_families(name: str, billions: float, segments: int, tmp_path: Path) -> None:
    plan = plan_of(spec=preset(name), precision="bf16")
    assert plan.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert plan.weights_bytes == pytest.approx(2 * plan.parameters, rel=0.001)
    assert plan.segments == {"rtx:sm89": segments}
    stage = build_of(plan)
    assert stage.mapped_bytes < 1.2 * plan.weights_bytes / segments  # cut evenly, among joint and single blocks
    assert stage.memory_bytes + stage.mapped_bytes <= 0.9 * 24 * GIB
    fewer = build_of(plan_of(spec=preset(name), precision="bf16", segments=segments - 1))
    assert fewer.memory_bytes + fewer.mapped_bytes > 0.9 * 24 * GIB
    check_plan(plan, tmp_path / "b")


def test_as_many_segments_as_joint_and_single_blocks() -> None:
    assert plan_of(spec=preset("flux1-dev"), segments=57).segments == {"rtx:sm89": 57}
    with pytest.raises(UsageError, match="a model of 57 blocks is cut into 1 to 57 segments"):
        plan_of(spec=preset("flux1-dev"), segments=58)


def test_half_the_model_takes_half_the_memory() -> None:
    whole, half = (build_of(plan_of(segments=n)) for n in (1, 2))
    fixed = estimates.PROCESS_MEMORY + estimates.BUILD_MEMORY
    assert (half.memory_bytes - fixed) / (whole.memory_bytes - fixed) == pytest.approx(0.5, abs=0.01)
    assert (half.seconds, half.disk_bytes) == (whole.seconds, whole.disk_bytes)


def test_the_build_that_was_measured() -> None:
    """24 joint blocks in fp16 in one piece: 5.7 GB were measured, and there is some room."""
    stage = build_of(plan_of(spec=from_depth(24), segments=1))
    assert 5.7 < stage.memory_bytes / 1e9 < 6.4
    assert stage.mapped_bytes / 1e9 == pytest.approx(4.06, rel=0.01)
    assert stage.disk_bytes / 1e9 == pytest.approx(4.14, rel=0.01)


def test_one_piece_of_8_billion_does_not_fit_24_gib_comfortably(tmp_path: Path) -> None:
    (warning,) = plan_of(segments=1).warnings
    assert warning.startswith("build rtx:sm89 (1 segment): 23.") and "25.77 GB" in warning
    error = refusal(plan_of(segments=1, memory=22 * 10**9), tmp_path / "b")
    assert "build rtx:sm89 (1 segment) needs 23." in str(error.received)
    assert "22.00 GB are available" in str(error.received)
    assert str(error.fix).startswith("--segments 3")
    check_plan(plan_of(segments=2), tmp_path / "b")


def test_where_no_number_of_segments_fits_the_refusal_says_so(tmp_path: Path) -> None:
    error = refusal(plan_of(memory=10**9, verify=False), tmp_path / "b")
    assert "build rtx:sm89 (" in str(error.received) and "1.00 GB are available" in str(error.received)
    assert "even in" in str(error.fix) and "GB" in str(error.fix) and "--segments" not in str(error.fix)


def test_every_stage_that_does_not_fit_is_named(tmp_path: Path) -> None:
    error = refusal(plan_of(("ort-cpu", "rtx:sm89"), memory=10**9, thorough=True), tmp_path / "b")
    for name in ("build rtx:sm89", "verify ort-cpu", "verify model.onnx"):
        assert f"{name} " in str(error.received)
    assert "drop --thorough" in str(error.fix) and "--no-verify" in str(error.fix)
    assert "weights needs" not in str(error.received)


def test_mapped_weights_that_do_not_fit_are_a_warning_and_no_refusal(tmp_path: Path) -> None:
    plan = plan_of(spec=from_depth(24), memory=9 * 10**9, segments=1)
    check_plan(plan, tmp_path / "b")
    (warning,) = plan.warnings
    assert warning.startswith("build rtx:sm89 (1 segment): 6.3") and "more than once" in warning
    assert f"warning: {warning}" in plan.text()


def test_the_most_segments_are_taken_where_none_is_comfortable(tmp_path: Path) -> None:
    """Anonymous memory fits, and the mapped weights do not quite."""
    tight = build_of(plan_of(memory=10**9)).memory_bytes + 10**8
    plan = plan_of(memory=tight, verify=False)
    assert plan.segments["rtx:sm89"] > 30 and plan.warnings
    check_plan(plan, tmp_path / "b")


def test_profiles_take_time_and_a_little_memory() -> None:
    one, three = (
        build_of(plan_of(segments=2, profiles=profiles))
        for profiles in ([], ["img_tokens=1024", "img_tokens=4096", "img_tokens=16384"])
    )
    assert three.seconds == pytest.approx(3 * one.seconds)
    assert 1.01 < three.memory_bytes / one.memory_bytes < 1.03
    assert three.disk_bytes == one.disk_bytes


def test_each_tensorrt_target_is_built_and_the_standard_graph_is_verified_once() -> None:
    plan = plan_of(("trt", "rtx:sm89", "ort-cuda"))
    count = plan.segments["trt"]
    assert [s.name for s in plan.stages] == [
        "graph",
        "weights",
        f"build trt ({count} segments)",
        f"build rtx:sm89 ({count} segments)",
        "verify ort-cuda",
        "verify model.onnx",
    ]
    assert plan.segments == {"trt": count, "rtx:sm89": count}


def test_onnx_runtime_builds_nothing() -> None:
    plan = plan_of(("ort-cpu",), spec=from_depth(24))
    assert [s.name for s in plan.stages] == [
        "graph",
        "weights",
        "verify ort-cpu",
        "verify ort-cpu (whole engine)",
    ]
    assert plan.segments == {}


def test_the_whole_engine_is_run_where_it_fits_and_is_never_a_reason_to_refuse(tmp_path: Path) -> None:
    plan = plan_of(("ort-cpu",), spec=from_depth(24), memory=3 * 10**9)
    assert [s.name for s in plan.stages] == ["graph", "weights", "verify ort-cpu"]
    check_plan(plan, tmp_path / "b")


def test_the_verification_that_was_measured() -> None:
    """bench/results/parity_memory.json."""
    streamed, whole = plan_of(("ort-cpu",), spec=from_depth(24)).stages[-2:]
    assert streamed.seconds == pytest.approx(179, rel=0.05) and whole.seconds == pytest.approx(168, rel=0.05)
    assert streamed.memory_bytes / 1e9 == pytest.approx(1.06, rel=0.1)


def test_more_shapes_take_more_time_and_memory() -> None:
    quick, thorough = (plan_of(thorough=value).stages[-1] for value in (False, True))
    assert thorough.seconds > 3 * quick.seconds and thorough.memory_bytes > quick.memory_bytes


@pytest.mark.parametrize(("verify", "graph_only"), [(False, False), (True, True)])
def test_what_is_left_out_costs_nothing(verify: bool, graph_only: bool) -> None:
    plan = plan_of(("ort-cpu", "rtx:sm89"), verify=verify, graph_only=graph_only)
    names = [s.name.split()[0] for s in plan.stages]
    assert names == (["graph"] if graph_only else ["graph", "weights", "build"])
    assert (plan.disk_bytes < 10**8) == graph_only == (plan.segments == {})


def test_random_weights_take_longer_than_a_checkpoint() -> None:
    read, drawn = (plan_of(from_checkpoint=value).stages[1] for value in (True, False))
    assert drawn.seconds > read.seconds and drawn.memory_bytes > read.memory_bytes
    assert 400e6 < read.memory_bytes < 450e6  # measured: 0.42 GB


def test_a_quantized_model_takes_its_calibration_a_search_and_memory_for_what_is_quantized() -> None:
    spec = from_depth(24)
    plans = {}
    for name in ("w4a16", "int8", "fp8"):
        compute = precision(name)
        recipe = QuantizationRecipe.default(name)
        targets = check_targets(("ort-cpu",), compute, tuple(recipe.schemes.values()))
        plans[name] = make_plan(
            spec,
            compute,
            Contract.of(spec, compute),
            targets,
            from_checkpoint=True,
            quantized=structure(spec, compute, recipe),
            calibrated=name != "w4a16",
            budgeted=name == "fp8",
            islands=name == "fp8",
            memory=24 * GIB,
        )
    stages = {name: {s.name: s for s in plan.stages} for name, plan in plans.items()}
    assert [next(iter(found)) for found in stages.values()] == ["graph", "calibrate", "calibrate"]
    assert list(stages["fp8"])[1:3] == ["budget", "fp16 plan"] and "budget" not in stages["int8"]
    assert stages["fp8"]["budget"].seconds > stages["fp8"]["calibrate"].seconds
    plain, smoothed = (stages[name]["weights"].memory_bytes for name in ("fp8", "int8"))
    largest = spec.width * spec.mlp_width
    assert smoothed - plain == 4 * largest
    scores = stages["fp8"]["verify ort-cpu"].memory_bytes - stages["int8"]["verify ort-cpu"].memory_bytes
    assert scores == 7 * 4 * spec.num_heads * max(2 * (16 * 17 + 32) ** 2, (20 * 15 + 120) ** 2)


def test_figures_that_were_not_measured_are_called_so() -> None:
    """Of enterprise TensorRT, which times kernels on the GPU."""
    (warning,) = plan_of(("trt",), segments=8).warnings
    assert warning.startswith("build trt (8 segments): these are TensorRT-RTX's figures")
    assert plan_of(("rtx:sm89",), segments=8).warnings == ()


@pytest.mark.parametrize("segments", [0, 39])
def test_a_model_has_as_many_segments_as_blocks_at_most(segments: int) -> None:
    with pytest.raises(UsageError, match="1 to 38 segments"):
        plan_of(segments=segments)


def test_a_small_disk_is_refused_with_what_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=20 * 10**9)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    error = refusal(plan_of(("rtx:sm89", "rtx:sm120")), tmp_path / "out" / "b")
    assert asked == [tmp_path]  # the nearest folder that is there
    assert "needs 49.02 GB on the disk" in error.rule and "build rtx:sm120 (2 segments) 16.4" in error.rule
    assert "20.00 GB" in str(error.received) and "fewer targets" in str(error.fix)
    assert "fewer targets" not in str(refusal(plan_of(), tmp_path / "out" / "b").fix)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_asked_for_where_it_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "available_memory", lambda: 10**8)
    error = refusal(plan_of(("ort-cpu",), memory=None), tmp_path / "b")
    assert "graph needs 0.40 GB" in str(error.received) and "0.10 GB are available" in str(error.received)


def test_the_text_has_a_line_for_every_stage() -> None:
    plan = plan_of(("ort-cpu", "rtx:sm89"))
    first, header, *lines = plan.text().splitlines()
    assert first.startswith("8.057 B parameters, weights file 16.113 GB, disk needed 32.58")
    assert "(25.77 GB available), about " in first
    assert header.split() == ["stage", "rough", "time", "memory", "mapped", "disk"]
    assert [line.strip().startswith(s.name) for line, s in zip(lines, plan.stages, strict=True)] == [True] * len(lines)
    assert len({len(line) for line in (header, *lines)}) == 1
    assert max(map(len, plan.text().splitlines())) <= 130


def test_the_plan_as_json() -> None:
    plan = plan_of(("ort-cpu", "rtx:sm89"))
    data = json.loads(json.dumps(plan.to_json()))
    assert data["segments"] == {"rtx:sm89": 2}
    assert [s["name"] for s in data["stages"]] == [s.name for s in plan.stages]
    assert data["memory_bytes"] == plan.memory_bytes and data["disk_bytes"] == plan.disk_bytes
    assert data["available_memory_bytes"] == 24 * GIB and data["warnings"] == []
    assert set(data["stages"][0]) == {"name", "seconds", "memory_bytes", "mapped_bytes", "disk_bytes"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (9, "9 s"), (89.6, "90 s"), (120, "2 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_rough_times(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text


def test_the_conditioning_is_a_build_of_its_own(tmp_path: Path) -> None:
    """Together the parts take the disk and the time of the whole; each takes less memory."""
    whole, parts = plan_of(segments=1), plan_of(segments=1, split=True)
    (one,) = (stage for stage in whole.stages if stage.name.startswith("build"))
    trunk, conditioning = (stage for stage in parts.stages if stage.name.startswith("build"))
    assert (trunk.name, conditioning.name) == ("build rtx:sm89 (1 segment)", "build rtx:sm89 conditioning")
    assert trunk.mapped_bytes + conditioning.mapped_bytes == one.mapped_bytes
    assert 0.33 < conditioning.mapped_bytes / one.mapped_bytes < 0.34  # of SD3.5-Large
    assert trunk.seconds + conditioning.seconds == pytest.approx(one.seconds)
    assert abs(parts.disk_bytes - whole.disk_bytes) < 10
    assert conditioning.memory_bytes < trunk.memory_bytes < one.memory_bytes
    error = refusal(plan_of(split=True, memory=6 * GIB), tmp_path / "b")
    assert "build rtx:sm89 conditioning needs" in str(error.received)
    assert "drop --split-conditioning" in str(error.fix)
