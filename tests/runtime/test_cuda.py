"""On a GPU: the ort-cuda engine computes the model, and can be timed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lent import Lent
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.errors import ContractError
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.latency import bench_bundle
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import Engine, sample
from mmdit_deploy.sampling import sample as sample_velocity
from mmdit_deploy.sampling import schedule
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify.metrics import compare
from mmdit_deploy.verify.tolerances import TOLERANCES
from random_inputs import random_inputs


def _lacking() -> str | None:
    """Why nothing can run on CUDA here, or None."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime-gpu is not installed"
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_lacking() is not None, reason=str(_lacking()))]
RANGES = {"batch": Range(1, 2, 4), "img_tokens": Range(1, 256, 4096), "txt_tokens": Range(1, 77, 256)}


SLEEP = 500_000_000  # cycles: about a quarter of a second


@pytest.fixture(scope="module")
def spec(tiny_spec: ModelSpec) -> ModelSpec:
    return tiny_spec


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def cuda_bundle(request: pytest.FixtureRequest, spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / f"tiny-{request.param}"
    precision = PRECISIONS[request.param]
    wanted = ExportRequest(spec, RandomWeights(0), precision, ("ort-cuda",), out=out, ranges=RANGES, verify=False)
    export(wanted)
    return out


def inputs(engine: Engine, sizes: tuple[int, int, int, int], seed: int = 8) -> dict[str, Tensor]:
    """On the CPU."""
    batch, rows, cols, txt_tokens = sizes
    by_axis = {"batch": batch, "img_tokens": rows * cols, "txt_tokens": txt_tokens}
    values = random_inputs(engine.contract, by_axis, seed)
    return {**values, "timestep": torch.linspace(999, 3, batch), "img_ids": grid_ids(rows, cols)}


@pytest.mark.parametrize("sizes", [(2, 3, 5, 4), (1, 1, 1, 1), (4, 16, 17, 77), (1, 64, 64, 256)])
def test_it_computes_the_model(
    cuda_bundle: Path,
    spec: ModelSpec,
    eager_model: Callable[..., MMDiT],
    sizes: tuple[int, int, int, int],
) -> None:
    engine = Engine.load(cuda_bundle)
    assert engine.target == "ort-cuda"
    feed = inputs(engine, sizes)
    received = engine({name: tensor.cuda() for name, tensor in feed.items()})["sample"]
    assert received.device.type == "cuda"
    with torch.inference_mode():  # on the CPU, in fp32: TF32 has no say in the reference
        expected = eager_model(spec, RandomWeights(0))(**{n: t.float() for n, t in feed.items()})
    precision = engine.bundle.precision.name
    errors = compare(received.cpu(), expected)
    # ONNX Runtime multiplies fp32 in TF32 on this hardware: 11 significant bits, as fp16 has
    tolerance = TOLERANCES["fp16" if precision == "fp32" else precision]
    assert errors.rel_l2 <= tolerance.max_rel_l2 and errors.cosine >= tolerance.min_cosine


def test_it_can_be_timed(cuda_bundle: Path) -> None:
    report = bench_bundle(cuda_bundle, ["ort-cuda"], rounds=3, warmup=1)
    assert report.timings[0].name == "ort-cuda" and report.machine["gpu"]
    assert {"ort-cuda", "eager"} <= {t.name for t in report.timings}
    assert all(t.p50_ms > 0 for t in report.timings)
    assert "ort-cuda / eager" in report.ratios


def test_memory_of_others_and_given_outputs(cuda_bundle: Path) -> None:
    with Engine.load(cuda_bundle) as engine:
        feed = {name: tensor.cuda() for name, tensor in inputs(engine, (2, 3, 5, 4)).items()}
        before = {name: tensor.clone() for name, tensor in feed.items()}
        expected = engine(feed)["sample"]
        received = engine({name: Lent(tensor) for name, tensor in feed.items()})["sample"]
        mine = torch.zeros_like(expected)
        assert engine(feed, outputs={"sample": mine})["sample"] is mine
        assert all(compare(t.cpu(), expected.cpu().float()).rel_l2 <= 2e-3 for t in (received, mine))
        assert all(torch.equal(tensor, before[name]) for name, tensor in feed.items())
        with pytest.raises(ContractError, match=r"hidden_states is on the device .* cuda:0"):
            engine({name: tensor.cpu().numpy() for name, tensor in feed.items()})


@pytest.mark.parametrize("named", [False, True])
def test_a_run_comes_after_what_the_callers_stream_holds(cuda_bundle: Path, named: bool) -> None:
    """Whether the stream is torch's current one or is passed."""
    with Engine.load(cuda_bundle) as engine:
        feed = {name: tensor.cuda() for name, tensor in inputs(engine, (2, 3, 5, 4)).items()}
        expected = engine(feed)["sample"]
        late = {name: torch.zeros_like(tensor) for name, tensor in feed.items()}
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            for name, tensor in late.items():
                tensor.copy_(feed[name])
            if not named:
                received = engine(late)["sample"]
        if named:
            received = engine(late, stream=stream)["sample"]
        stream.synchronize()
        assert compare(received.cpu(), expected.cpu().float()).rel_l2 <= 2e-3


def test_calls_of_many_threads_do_not_disturb_each_other(cuda_bundle: Path) -> None:
    with Engine.load(cuda_bundle) as engine:
        shapes = [(1, 2, 3, 4), (2, 3, 5, 4), (4, 8, 8, 20), (3, 2, 2, 9)]
        feeds = [{n: t.cuda() for n, t in inputs(engine, s, i).items()} for i, s in enumerate(shapes)]
        expected = [engine(feed)["sample"].cpu().float() for feed in feeds]

        def work(seed: int) -> float:
            chosen = [(seed + i) % len(feeds) for i in range(40)]
            return max(compare(engine(feeds[i])["sample"].cpu(), expected[i]).rel_l2 for i in chosen)

        with ThreadPoolExecutor(8) as pool:
            assert max(pool.map(work, range(8))) <= 2e-3


def test_a_sampler_brings_its_tensors_over(cuda_bundle: Path, spec: ModelSpec) -> None:
    with Engine.load(cuda_bundle) as engine:
        feed = inputs(engine, (2, 3, 5, 4))
        channels, sigmas = spec.out_dim, schedule(3)
        noise, beside = feed["hidden_states"].float().split([channels, spec.img_dim - channels], dim=2)
        prompt = {name: feed[name] for name in ("encoder_hidden_states", "pooled_projections")}
        received = sample(engine, noise, sigmas, grid=(3, 5), prompt=prompt, beside=beside)
        there = {name: tensor.cuda() for name, tensor in feed.items()}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            hidden = torch.cat([x.to(there["hidden_states"].dtype), there["hidden_states"][:, :, channels:]], dim=2)
            return engine({**there, "hidden_states": hidden, "timestep": 1000 * sigma})["sample"]

        expected = sample_velocity(velocity, noise.cuda(), sigmas)
        assert received.device == engine.device
        assert compare(received.cpu(), expected.cpu()).rel_l2 <= 5e-3
