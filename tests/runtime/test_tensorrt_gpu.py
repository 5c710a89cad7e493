"""On a GPU: TensorRT engines compute the model, on the caller's stream, at every profile, in segments, as graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lent import Lent
from mmdit_deploy.build import RTX, TENSORRT
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import ContractError, MachineError
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.latency import bench_bundle
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import Engine, engine_files, runnable_target, tensorrt
from mmdit_deploy.runtime.runtime_cache import RuntimeCache
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verification import verify_bundle
from mmdit_deploy.verify.metrics import compare
from mmdit_deploy.verify.tolerances import TOLERANCES
from random_inputs import random_inputs


def _targets() -> list[str]:
    """The TensorRT targets that can be built for this machine's GPU, and run on it."""
    if not torch.cuda.is_available():
        return []
    sm = "sm{}{}".format(*torch.cuda.get_device_capability())
    return [f"rtx:{sm}"] * (sm in RTX.capabilities and RTX.version() is not None) + ["trt"] * bool(TENSORRT.version())


TARGETS = _targets()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not TARGETS,
        reason="no TensorRT that fits this GPU" if torch.cuda.is_available() else "no GPU that torch can use",
    ),
]
RANGES = {"batch": Range(1, 2, 4), "img_tokens": Range(4, 256, 4096), "txt_tokens": Range(2, 77, 256)}
SMALL = {"batch": Range(1, 1, 2), "img_tokens": Range(4, 16, 64), "txt_tokens": Range(2, 16, 32)}
# (batch, rows, columns, text tokens); the first three fit the small profile
SHAPES = [(2, 3, 5, 4), (1, 2, 2, 2), (1, 8, 8, 32), (4, 16, 17, 77), (1, 64, 64, 256), (3, 2, 2, 5)]
SLEEP = 2_000_000_000  # cycles: about a second


@pytest.fixture(scope="module", params=TARGETS or ["none"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exported(tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``exported(target, segments=1, precision="fp16")``: a bundle with two profiles and block 0's output."""
    made: dict[object, Path] = {}

    def get(target: str, segments: int = 1, precision: str = "fp16") -> Path:
        key = (target, segments, precision)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("trt") / f"tiny-{precision}"
            wanted = ExportRequest(
                tiny_spec,
                RandomWeights(0),
                PRECISIONS[precision],
                (target,),
                out=made[key],
                ranges=RANGES,
                profiles=(SMALL, RANGES),
                segments=segments,
                outputs=("blocks.0",),
                verify=precision == "fp16",  # the engine runs here, so it is run
            )
            export(wanted)
        return made[key]

    return get


def feed(engine: Engine, shape: tuple[int, int, int, int] = SHAPES[0], seed: int = 8) -> dict[str, Tensor]:
    batch, rows, cols, txt_tokens = shape
    sizes = {"batch": batch, "img_tokens": rows * cols, "txt_tokens": txt_tokens}
    values = random_inputs(engine.contract, sizes, seed)
    values |= {"timestep": torch.linspace(999, 3, batch), "img_ids": grid_ids(rows, cols)}
    return {name: tensor.to(engine.device) for name, tensor in values.items()}


def close_to(received: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float) -> bool:
    torch.cuda.synchronize()
    return all(compare(received[n].cpu(), t.cpu().float()).rel_l2 <= within for n, t in expected.items())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("segments", [1, 2])
def test_it_computes_the_model(
    target: str,
    exported: Callable[..., Path],
    tiny_spec: ModelSpec,
    eager_model: Callable[..., MMDiT],
    segments: int,
    precision: str,
) -> None:
    """At every shape and profile, with kernels for any shape and with those for this one."""
    if (target, precision) == ("rtx:sm75", "bf16"):
        pytest.skip("bf16 came with compute capability 8.0")
    model = eager_model(tiny_spec, RandomWeights(0))
    tolerance = TOLERANCES[precision]
    for specialize in ("none", "eager"):
        with Engine.load(exported(target, segments, precision), target, specialize=specialize) as engine:
            assert len(engine_files(engine.bundle, target)[1]) == segments
            for shape in SHAPES:
                inputs = feed(engine, shape)
                received = engine(inputs)
                with torch.inference_mode():  # on the CPU, in fp32
                    expected = model(**{n: t.cpu().float() for n, t in inputs.items()})
                errors = compare(received["sample"].cpu(), expected)
                assert errors.rel_l2 <= tolerance.max_rel_l2 and errors.cosine >= tolerance.min_cosine, shape
                assert received["blocks.0"].isfinite().all()


@pytest.mark.parametrize("segments", [1, 2])
def test_segments_profiles_and_graphs_change_nothing(target: str, exported: Callable[..., Path], segments: int) -> None:
    """More shapes than graphs are kept: each is captured, launched, given up, and captured again."""
    grids = [(1, 2, 2 + i, 4) for i in range(tensorrt.MAX_GRAPHS + 2)]
    path = exported(target, segments)
    with (
        Engine.load(path, target, specialize="eager") as plain,
        Engine.load(path, target, specialize="eager", cuda_graphs=True) as graphs,
    ):
        for _ in range(3):
            for seed, shape in enumerate([*SHAPES, *grids]):
                inputs = feed(plain, shape, seed)
                before = {name: t.clone() for name, t in inputs.items()}
                assert close_to(graphs(inputs), plain(inputs), 2e-3), shape
                assert all(torch.equal(t, before[name]) for name, t in inputs.items())


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("mine", [False, True])
def test_work_is_in_order_with_the_callers_stream_and_the_host_does_not_wait(
    target: str, exported: Callable[..., Path], mine: bool, cuda_graphs: bool
) -> None:
    with Engine.load(exported(target, 2), target, specialize="eager", cuda_graphs=cuda_graphs) as engine:
        inputs, late = feed(engine), feed(engine, seed=9)
        expected = {name: t.clone() for name, t in engine(inputs).items()}
        for _ in range(3):  # compiled, captured, launched
            engine(inputs)
        torch.cuda.synchronize()
        stream, done = torch.cuda.Stream() if mine else torch.cuda.current_stream(), torch.cuda.Event()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            for name, tensor in late.items():
                tensor.copy_(inputs[name])  # what the call must see comes late
            received = engine(late)
            copies = {name: t.clone() for name, t in received.items()}  # and what comes after must see the result
            for tensor in late.values():
                tensor.zero_()
            done.record()
        assert not done.query()
        assert close_to(copies, expected, 2e-3)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_calls_on_several_streams_do_not_disturb_each_other(
    target: str, exported: Callable[..., Path], cuda_graphs: bool
) -> None:
    """They share activation memory: without waiting for one another, they would."""
    with Engine.load(exported(target, 2), target, specialize="eager", cuda_graphs=cuda_graphs) as engine:
        feeds = [feed(engine, shape, seed) for seed, shape in enumerate(SHAPES[:4])]
        expected = [{name: t.clone() for name, t in engine(inputs).items()} for inputs in feeds]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in feeds]
        for _ in range(20):
            received = [engine(inputs, stream=stream) for inputs, stream in zip(feeds, streams, strict=True)]
        assert all(close_to(out, wanted, 2e-3) for out, wanted in zip(received, expected, strict=True))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_views_odd_addresses_and_given_outputs(target: str, exported: Callable[..., Path], cuda_graphs: bool) -> None:
    with Engine.load(exported(target), target, specialize="eager", cuda_graphs=cuda_graphs) as engine:
        inputs = feed(engine)
        expected = {name: t.clone() for name, t in engine(inputs).items()}
        strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items()}
        offset = {name: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for name, t in inputs.items()}
        assert offset["hidden_states"].data_ptr() % 256
        for odd in (strided, offset):
            assert close_to(engine(odd), expected, 2e-3)
        sample = torch.zeros(expected["sample"].numel() + 1, dtype=torch.float16, device=engine.device)[1:]
        mine = {"sample": sample.view(expected["sample"].shape)}
        assert engine(inputs, outputs=mine)["sample"] is mine["sample"]
        assert close_to(mine, {"sample": expected["sample"]}, 2e-3)


def test_memory_of_others_and_tables_of_conditioning(target: str, exported: Callable[..., Path]) -> None:
    with Engine.load(exported(target), target, specialize="eager") as engine:
        inputs = feed(engine)
        expected = {name: t.clone() for name, t in engine(inputs).items()}
        assert close_to(engine({name: Lent(t) for name, t in inputs.items()}), expected, 2e-3)
        conditions = ("timestep", "pooled_projections")
        times = torch.stack([inputs["timestep"] / 2, inputs["timestep"]])
        table = engine.condition({"timestep": times, "pooled_projections": inputs["pooled_projections"]})
        others = {name: t for name, t in inputs.items() if name not in conditions}
        assert close_to(engine(others, conditioning=table[1]), expected, 2e-3)
        assert not close_to(engine(others, conditioning=table[0]), expected, 2e-3)
        with pytest.raises(ContractError, match="is on the device"):
            engine({name: t.cpu().numpy() for name, t in inputs.items()})


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_calls_of_many_threads_do_not_disturb_each_other(
    target: str, exported: Callable[..., Path], cuda_graphs: bool
) -> None:
    """On streams of their own."""
    with Engine.load(exported(target, 2), target, specialize="eager", cuda_graphs=cuda_graphs) as engine:
        feeds = [feed(engine, shape, seed) for seed, shape in enumerate(SHAPES[:4])]
        expected = [{name: t.clone() for name, t in engine(inputs).items()} for inputs in feeds]
        torch.cuda.synchronize()

        def work(seed: int) -> bool:
            with torch.cuda.stream(torch.cuda.Stream()):
                chosen = [(seed + i) % len(feeds) for i in range(40)]
                return all([is_right(i) for i in chosen])

        def is_right(index: int) -> bool:
            received = engine(feeds[index])
            torch.cuda.current_stream().synchronize()  # the other threads go on
            return all(compare(received[n].cpu(), t.cpu().float()).rel_l2 <= 2e-3 for n, t in expected[index].items())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))


def test_inference_mode_comes_and_goes(target: str, exported: Callable[..., Path]) -> None:
    with Engine.load(exported(target), target, cuda_graphs=True) as engine:
        inputs = feed(engine)
        with torch.inference_mode():
            first = engine(inputs)["sample"].clone()
        assert close_to(engine(inputs), {"sample": first}, 2e-3)


def test_sizes_that_no_profile_holds(target: str, tiny_spec: ModelSpec, tmp_path: Path) -> None:
    """Two profiles that leave a gap between them."""
    large = {**RANGES, "img_tokens": Range(128, 256, 512)}
    wanted = ExportRequest(
        tiny_spec,
        RandomWeights(0),
        PRECISIONS["fp16"],
        (target,),
        out=tmp_path / "gap",
        profiles=(SMALL, large),
        verify=False,
    )
    export(wanted)
    with Engine.load(tmp_path / "gap", target) as engine:
        for shape in ((1, 8, 8, 16), (1, 8, 16, 16)):
            assert engine(feed(engine, shape))["sample"].isfinite().all()
        with pytest.raises(ContractError, match="--profile batch=1,img_tokens=100,txt_tokens=16"):
            engine(feed(engine, (1, 10, 10, 16)))


def test_auto_takes_it(target: str, exported: Callable[..., Path]) -> None:
    with Engine.load(exported(target)) as engine:
        assert engine.target == target == runnable_target(engine.bundle)


def test_memory_is_given_back(target: str, exported: Callable[..., Path]) -> None:
    path = exported(target)
    free = []
    for _ in range(4):
        engine = Engine.load(path, target, cuda_graphs=True)
        engine(feed(engine))
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] - free[-1] <= 16 * 2**20  # the first load also loads libraries


@pytest.mark.skipif(not any(t.startswith("rtx") for t in TARGETS), reason="no TensorRT-RTX that fits this GPU")
def test_compiled_kernels_are_kept_and_taken_again(
    exported: Callable[..., Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = next(t for t in TARGETS if t.startswith("rtx"))
    path = exported(target, 2)
    with Engine.load(path, target, specialize="eager") as engine:
        (file,) = own_cache.rglob("*.kernels")  # before the first call: most kernels are compiled at load
        at_load = file.stat().st_size
        expected = {name: t.clone() for name, t in engine(feed(engine)).items()}
    assert file.stat().st_size >= at_load > 0
    taken: list[bool] = []
    init = RuntimeCache.__init__

    def spied(self: RuntimeCache, cache: Any, place: Path | None) -> None:
        init(self, cache, place)
        taken.append(self._written is not None)

    monkeypatch.setattr(RuntimeCache, "__init__", spied)
    with Engine.load(path, target, specialize="eager") as engine:
        assert taken == [True]
        assert close_to(engine(feed(engine)), expected, 2e-3)
    file.write_bytes(b"no cache at all")
    with Engine.load(path, target, specialize="eager") as engine:
        assert taken == [True, False]
        assert close_to(engine(feed(engine)), expected, 2e-3)
    assert file.stat().st_size >= at_load and list(own_cache.rglob("*.kernels")) == [file]


@pytest.mark.skipif(not any(t.startswith("rtx") for t in TARGETS), reason="no TensorRT-RTX that fits this GPU")
def test_an_engine_for_another_gpu_is_refused(
    exported: Callable[..., Path], tiny_spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By us, and, were we to look away, by TensorRT-RTX: both before anything is deserialized."""
    mine = next(t for t in TARGETS if t.startswith("rtx"))
    other = next(f"rtx:{sm}" for sm in ("sm89", "sm86", "sm120") if f"rtx:{sm}" != mine)
    out = tmp_path / "other"
    export(
        ExportRequest(tiny_spec, RandomWeights(0), PRECISIONS["fp16"], (other,), out=out, ranges=RANGES, verify=False)
    )
    monkeypatch.setattr("mmdit_deploy.runtime.tensorrt.deserialize", lambda *_: pytest.fail("it was deserialized"))
    with pytest.raises(MachineError, match=f"--target {mine}"):
        Engine.load(out, other)
    monkeypatch.setattr("mmdit_deploy.runtime.tensorrt.check_runs_here", lambda *_: None)
    with pytest.raises(MachineError, match="unsupported cc"):
        Engine.load(out, other)


def test_it_is_verified_and_timed(target: str, exported: Callable[..., Path]) -> None:
    path = exported(target, 2)
    verdict = verify_bundle(path, target=target)
    assert verdict.passed and verdict.target == target and not verdict.not_executed
    report = bench_bundle(path, [target], batch=1, img_tokens=64, txt_tokens=16, rounds=3, warmup=1)
    assert report.timings[0].name == target and all(t.p50_ms > 0 for t in report.timings)
    assert f"{target} / eager" in report.ratios
