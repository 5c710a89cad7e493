"""On a GPU: the ort-cuda engine computes the model, and can be timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmdit_deploy.checkpoint import random_tensor
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Range
from mmdit_deploy.export import ExportRequest, export
from mmdit_deploy.latency import bench_bundle
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import Engine
from mmdit_deploy.spec import PRECISIONS, ModelSpec
from mmdit_deploy.verify.metrics import compare
from mmdit_deploy.verify.tolerances import TOLERANCES


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


@pytest.mark.parametrize("sizes", [(2, 3, 5, 4), (1, 1, 1, 1), (4, 16, 17, 77), (1, 64, 64, 256)])
def test_it_computes_the_model(
    cuda_bundle: Path,
    spec: ModelSpec,
    eager_model: Callable[..., MMDiT],
    sizes: tuple[int, int, int, int],
) -> None:
    engine = Engine.load(cuda_bundle)
    assert engine.target == "ort-cuda"
    batch, rows, cols, txt_tokens = sizes
    by_axis = {"batch": batch, "img_tokens": rows * cols, "txt_tokens": txt_tokens}
    feed = {
        t.name: random_tensor(8, t.name, t.shape(by_axis), std=1.0, dtype=getattr(torch, t.dtype))
        for t in engine.contract.inputs
    }
    feed |= {"timestep": torch.linspace(999, 3, batch), "img_ids": grid_ids(rows, cols)}
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
