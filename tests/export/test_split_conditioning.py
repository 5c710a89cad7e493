"""Bundles in two parts: what is in them, and that callers see no difference."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from mmdit_deploy.build.layers_file import read_layers
from mmdit_deploy.build.traffic import traffic_of
from mmdit_deploy.bundle import open_bundle
from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.cli import bench as bench_command
from mmdit_deploy.cli import inspect as inspect_command
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import BundleError, GraphError, MachineError, UsageError
from mmdit_deploy.model import calls, conditioning_calls
from mmdit_deploy.runtime import Engine, engine_files, runner, sample
from mmdit_deploy.runtime.split import InTwoParts
from mmdit_deploy.sampling import schedule as noise_levels
from mmdit_deploy.spec import ModelSpec
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify import Case
from mmdit_deploy.verify.cases import case_inputs

CASE = Case(2, 3, 5, 4, timestep=500.25)
RANGES = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 48), "txt_tokens": Range(1, 8, 16)}
CONDITIONS = ("timestep", "pooled_projections")
STEPS = 150  # of two samples: more than the 2 · 64 rows of one call

ExportOnce = Callable[..., Any]


@pytest.fixture(scope="module")
def bundles(tiny_spec: ModelSpec, export_once: ExportOnce) -> Mapping[str, Any]:
    """One model in fp32 for ONNX Runtime, in one part and in two."""
    options = {"precision": "fp32", "ranges": RANGES}
    return {
        "one": export_once(tiny_spec, "ort-cpu", verify=False, **options),
        "two": export_once(tiny_spec, "ort-cpu", split_conditioning=True, **options),
    }


@pytest.fixture
def inputs(tiny_spec: ModelSpec, bundles: Mapping[str, Any]) -> dict[str, Tensor]:
    return case_inputs(CASE, open_bundle(bundles["one"].path).contract, tiny_spec)


def schedule(inputs: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    """From noise to image; the second sample is always a little ahead."""
    times = torch.linspace(1000, 1, steps)[:, None] - torch.tensor([0.0, 0.75])
    return {"timestep": times, "pooled_projections": inputs["pooled_projections"]}


def others(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in CONDITIONS}


def test_a_call_with_all_inputs_and_a_schedule_of_one_step_are_equal_to_the_bit(
    bundles: Mapping[str, Any], inputs: dict[str, Tensor]
) -> None:
    with Engine.load(bundles["one"].path) as one, Engine.load(bundles["two"].path) as two:
        assert one.contract == two.contract
        expected = one(inputs)["sample"]
        assert torch.equal(two(inputs)["sample"], expected)
        (step,) = two.condition({**schedule(inputs, 1), "timestep": inputs["timestep"][None]})
        assert torch.equal(two(others(inputs), conditioning=step)["sample"], expected)


@pytest.mark.parametrize("conditioning", ["resident", "released"])
def test_every_step_of_a_long_schedule_is_that_of_the_model_in_one_part(
    bundles: Mapping[str, Any], inputs: dict[str, Tensor], conditioning: str
) -> None:
    """More rows than the conditioning takes at once: they are made in three pieces, the last of them a short one."""
    with Engine.load(bundles["one"].path) as one, Engine.load(bundles["two"].path, conditioning=conditioning) as two:
        plan = schedule(inputs, STEPS)
        table = two.condition(plan)
        assert len(table) == STEPS > 2 * 64
        for step in (0, 63, 64, 127, 128, STEPS - 1):
            expected = one({**inputs, "timestep": plan["timestep"][step]})["sample"]
            found = two(others(inputs), conditioning=table[step])["sample"]
            assert (found - expected).norm() <= 1e-5 * expected.norm(), step
        assert not torch.allclose(found, two(others(inputs), conditioning=table[0])["sample"])


def test_a_table_of_another_engine_and_what_is_not_of_the_trunk_are_refused(
    bundles: Mapping[str, Any], inputs: dict[str, Tensor]
) -> None:
    with Engine.load(bundles["one"].path) as one, Engine.load(bundles["two"].path) as two:
        (step,) = one.condition(schedule(inputs, 1))
        with pytest.raises(Exception, match="another engine"):
            two(others(inputs), conditioning=step)
        (step,) = two.condition(schedule(inputs, 1))
        with pytest.raises(Exception, match="timestep"):
            two(inputs, conditioning=step)


def test_released_conditioning_is_in_memory_in_condition_alone(
    bundles: Mapping[str, Any], inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Counted(runner.OrtRunner):
        def __init__(self, graph: Path, *arguments: Any, **options: Any):
            super().__init__(graph, *arguments, **options)
            self.name = graph.name
            loaded.append(self.name)

        def close(self) -> None:
            super().close()
            loaded.remove(self.name)

    monkeypatch.setattr(runner, "OrtRunner", Counted)
    with Engine.load(bundles["two"].path, conditioning="released") as engine:
        assert loaded == ["trunk.ort.onnx"]
        table = engine.condition(schedule(inputs, 3))
        assert loaded == ["trunk.ort.onnx"]
        engine(others(inputs), conditioning=table[2])
    assert loaded == []
    with pytest.raises(MachineError, match="closed"):
        engine.condition(schedule(inputs, 3))
    with Engine.load(bundles["two"].path):
        assert sorted(loaded) == ["conditioning.ort.onnx", "trunk.ort.onnx"]
    with pytest.raises(UsageError, match="resident"):
        Engine.load(bundles["two"].path, conditioning="gone")


def test_threads_of_a_part_leave_the_cores_to_the_other(bundles: Mapping[str, Any]) -> None:
    """A call with all inputs runs both; threads that spin after the first would slow the second."""
    with Engine.load(bundles["one"].path) as one, Engine.load(bundles["two"].path) as two:
        stops = [
            runner._session.get_session_options().get_session_config_entry("session.force_spinning_stop")
            for runner in (two._runner, two._conditioner._runner)
        ]
        assert stops == ["1", "1"]
        with pytest.raises(RuntimeError):
            one._runner._session.get_session_options().get_session_config_entry("session.force_spinning_stop")


def test_an_engine_that_was_closed_makes_no_table(
    bundles: Mapping[str, Any], inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a call that waits for its turn when it is closed: the memory would come back."""
    engine = Engine.load(bundles["two"].path, conditioning="released")
    load_once, loads = engine._conditioner._load, list[int]()
    entered, go_on = threading.Event(), threading.Event()

    def load() -> Any:
        loads.append(threading.get_ident())
        entered.set()
        assert go_on.wait(60)
        return load_once()

    monkeypatch.setattr(engine._conditioner, "_load", load)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.condition, schedule(inputs, 2))
        assert entered.wait(60)
        second = pool.submit(engine.condition, schedule(inputs, 2))
        engine.close()
        go_on.set()
        assert len(first.result()) == 2
        with pytest.raises(MachineError, match="closed"):
            second.result()
    assert len(loads) == 1


def test_the_sampler_makes_the_same_of_both(bundles: Mapping[str, Any], tiny_spec: ModelSpec) -> None:
    prompt = {
        "encoder_hidden_states": random_tensor(1, "text", (1, 4, tiny_spec.txt_dim), std=1.0),
        "pooled_projections": random_tensor(1, "pooled", (1, tiny_spec.pooled_dim), std=1.0),
    }
    made = [
        sample(
            Engine.load(bundles[name].path),
            random_tensor(1, "noise", (1, 12, tiny_spec.out_dim), std=1.0),
            noise_levels(3),
            grid=(3, 4),
            prompt=prompt,
            negative={name: -tensor for name, tensor in prompt.items()},
            guidance_scale=2.0,
            beside=random_tensor(1, "beside", (1, 12, tiny_spec.img_dim - tiny_spec.out_dim), std=1.0),
        )
        for name in ("one", "two")
    ]
    assert torch.linalg.vector_norm(made[0] - made[1]) <= 1e-5 * torch.linalg.vector_norm(made[0])


def test_what_is_in_the_bundle(bundles: Mapping[str, Any], tiny_spec: ModelSpec) -> None:
    one, two = ({p.name for p in bundles[name].path.iterdir()} for name in ("one", "two"))
    reports = {"parity.json", "reference.safetensors", "report.html"}
    assert two - one == {"conditioning.ort.onnx", "trunk.ort.onnx"} | reports  # beside the whole graphs
    bundle, fields = open_bundle(bundles["two"].path), bundles["two"].fields
    assert fields["engines"]["ort-cpu"]["graph"] == "trunk.ort.onnx"
    assert fields["engines"]["ort-cpu"]["conditioning"]["graph"] == "conditioning.ort.onnx"
    assert bundle.split is not None and fields["split"] == bundle.split.to_json()
    assert [t.name for t in bundle.split.conditioning.inputs] == list(CONDITIONS)
    width = sum(int(call.kind.outputs[0].axes[-1]) for call in calls(tiny_spec) if call.modulates)
    assert bundle.split.table.axes == ("batch", width)
    assert fields["contract"] == bundles["one"].fields["contract"] and bundles["one"].fields["split"] is None


def test_the_composed_engine_is_verified_at_export_and_later(bundles: Mapping[str, Any]) -> None:
    made = bundles["two"].verdict("ort-cpu")
    assert made["passed"] and made["executed"][1].startswith("the whole engine, conditioning and trunk, 9 cases")
    again = verify_bundle(bundles["two"].path)
    assert again.passed and again.executed[1].startswith("the whole engine, conditioning and trunk")
    assert len(again.executed) == 2 and again.executed[0].startswith("11 calls one by one")


def test_a_table_that_is_right_for_one_step_alone_is_rejected(
    bundles: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are by sample, and within a sample by step."""
    by_step = InTwoParts.tabulate

    def by_sample(
        self: InTwoParts, schedule: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> list[dict[str, Tensor]]:
        rows = torch.stack([step["modulation"] for step in by_step(self, schedule, sizes)])
        return [{"modulation": part} for part in rows.transpose(0, 1).flatten(0, 1).split(sizes["batch"])]

    monkeypatch.setattr(InTwoParts, "tabulate", by_sample)
    failure = verify_bundle(bundles["two"].path).first_failure
    assert failure is not None and failure.level == "engine" and failure.case.batch == 2


def edited(bundle: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a bundle whose manifest says something else."""
    to.mkdir()
    for file in bundle.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    document = json.loads((to / "manifest.json").read_text())
    change(document)
    (to / "manifest.json").write_text(json.dumps(document))
    return to


def test_parts_that_are_not_the_graph_are_found_without_running_them(
    bundles: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory does not suffice for the whole engine, its parts are still those of the graph that is stepped."""
    copy = edited(bundles["two"].path, tmp_path / "b", lambda document: None)
    graph = onnx.load(copy / "conditioning.ort.onnx", load_external_data=False)
    (concat,) = (node for node in graph.graph.node if node.name == "modulation.tensors")
    concat.input[0], concat.input[2] = concat.input[2], concat.input[0]
    onnx.save(graph, copy / "conditioning.ort.onnx")
    monkeypatch.setattr("mmdit_deploy.bundle.opening._check_content", lambda *_: None)
    monkeypatch.setattr("mmdit_deploy.verify.whole.available_memory", lambda: 0)
    with pytest.raises(GraphError, match="with the modulation table between them"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(split=[]), "split: "),
        (lambda d: d["engines"]["ort-cpu"].pop("conditioning"), "engines: "),
        (lambda d: d["engines"]["ort-cpu"].update(conditioning={}), "engines: "),
        (lambda d: d["split"]["trunk"].update(inputs=[]), "not parts of the contract"),
        (lambda d: d["split"]["conditioning"].update(outputs=[]), "does not make modulation"),
        (lambda d: d["split"]["conditioning"]["ranges"].update(batch=[1, 1, 1]), "the conditioning takes"),
        (lambda d: d["split"]["conditioning"].update(inputs=[]), "the conditioning reads nothing"),
        (lambda d: d["split"].pop("trunk"), "KeyError"),
    ],
)
def test_a_manifest_of_other_parts_is_refused(
    bundles: Mapping[str, Any], tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    copy = edited(bundles["two"].path, tmp_path / "b", change)
    with pytest.raises(BundleError, match=words):
        open_bundle(copy)


def test_a_bundle_of_a_version_that_knew_no_parts_opens(bundles: Mapping[str, Any], tmp_path: Path) -> None:
    copy = edited(bundles["one"].path, tmp_path / "b", lambda document: document.pop("split"))
    assert open_bundle(copy).split is None


def test_inspect_says_what_each_part_weighs(bundles: Mapping[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command.main([str(bundles["two"].path), "--json"]) == 0
    out, text = capsys.readouterr()
    parts = json.loads(out)["split"]
    weights = (bundles["two"].path / "weights.safetensors").stat().st_size
    total = parts["conditioning"]["weight_bytes"] + parts["trunk"]["weight_bytes"]
    assert 0 <= weights - total < 20_000  # the header
    share = f"{parts['trunk']['weight_bytes'] / total:.1%} of the weights"
    assert any(line.startswith("  trunk ") and share in line for line in text.splitlines())


def test_bench_times_a_step_without_its_conditioning_and_with_it(
    bundles: Mapping[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit_deploy.latency.bundle._torch_rivals", lambda *_: ({}, {}))
    assert bench_command.main([str(bundles["two"].path), "--json"]) == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert [timing["name"] for timing in timings] == ["ort-cpu", "ort-cpu + modulation"]
    assert timings[0]["how"].endswith("modulation made before")


@pytest.fixture(scope="module")
def engines(tensorrt_rtx: Any, deep_spec: ModelSpec, export_once: ExportOnce) -> Mapping[str, Any]:
    """Three blocks for SM89: in one part, in two, and in two with a trunk of two segments."""
    return {
        "one": export_once(deep_spec, "rtx:sm89", precision="fp32", verify=False),
        "two": export_once(deep_spec, "rtx:sm89", precision="fp32", split_conditioning=True),
        "cut": export_once(deep_spec, "rtx:sm89", precision="fp32", split_conditioning=True, segments=2, verify=False),
    }


def test_tensorrt_engines_of_the_parts(engines: Mapping[str, Any], deep_spec: ModelSpec) -> None:
    """The trunk has no kernel of the conditioning, a third less weights, and elsewhere the kernels that there were."""
    made = engines["two"]
    whole, trunk = engines["one"].result.engines["rtx:sm89"], made.result.engines["rtx:sm89"]
    conditioning = made.result.conditioning["rtx:sm89"]
    apart = [call.path for call in conditioning_calls(calls(deep_spec))]
    assert list(conditioning.segments[0].calls) == apart and len(trunk.segments) == 1
    assert trunk.kernels_by_call == Counter(
        {call: count for call, count in whole.kernels_by_call.items() if call not in (*apart, "engine")}
    )
    assert trunk.fused_attentions == whole.fused_attentions
    assert conditioning.kernels == whole.kernels - trunk.kernels + 1  # which puts the tensors of all blocks in order
    bundle = open_bundle(made.path)
    record, files = engine_files(bundle, "rtx:sm89", conditioning=True)
    assert [f.relative_to(bundle.path).as_posix() for f in files] == ["engines/rtx-sm89/conditioning/segment-0.engine"]
    assert record.profiles == ({"batch": Range(1, 28, 128)},)
    listed, (file,) = read_layers(bundle.path / "engines/rtx-sm89/conditioning/layers.json")
    assert listed.to_json() == record.to_json()
    weights = [
        traffic_of(layer for layer in part.layers if layer.is_kernel).weights
        for part in (
            file,
            *(read_layers(engines[n].path / "engines/rtx-sm89/layers.json")[1][0] for n in ("two", "one")),
        )
    ]
    assert weights[0] + weights[1] == pytest.approx(weights[2], rel=1e-3) and weights[1] < 0.75 * weights[2]


def test_every_segment_of_a_trunk_reads_the_table(engines: Mapping[str, Any]) -> None:
    bundle = open_bundle(engines["cut"].path)
    record, files = engine_files(bundle, "rtx:sm89")  # the runtime's own check of the chain
    assert len(files) == 2 and bundle.split is not None
    assert all(bundle.split.table in segment.inputs for segment in record.segments)


@pytest.mark.usefixtures("no_gpu")
def test_they_are_built_and_not_executed_and_the_log_says_so(
    engines: Mapping[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = engines["two"]
    verdict = made.verdict("rtx:sm89")
    assert verdict["passed"] and not verdict["engine_executed"]
    (line,) = [said for said in made.said if said.startswith("build: rtx:sm89 conditioning: ")]
    assert "no attention" in line
    assert inspect_command.main([str(made.path)]) == 0
    text = capsys.readouterr().out
    assert "\nengine rtx:sm89\n" in text and "\nengine rtx:sm89 conditioning\n" in text


def test_graphs_alone_have_their_parts(
    tiny_spec: ModelSpec, export_once: ExportOnce, traced_once: Callable[[], contextlib.AbstractContextManager[object]]
) -> None:
    made = export_once(tiny_spec, "ort-cpu", precision="fp32", split_conditioning=True, graph_only=True)
    assert {p.name for p in made.path.iterdir()} == {
        "manifest.json", "model.onnx", "model.ort.onnx", "conditioning.ort.onnx", "trunk.ort.onnx"
    }  # fmt: skip
    assert open_bundle(made.path).split is not None and made.fields["engines"] == {}
