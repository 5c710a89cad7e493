"""The example program goes from noise to the latent, from a bundle and .npy files, as Python does: to the bit."""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdit_deploy.errors import UsageError
from mmdit_deploy.runtime import Engine
from mmdit_deploy.runtime.sampling import sample
from mmdit_deploy.sampling import schedule, timesteps

STEPS, SHIFT, SCALE = 4, 2.5, 4.5


def run_example(build: Path, bundle: Path, folder: Path, start: SimpleNamespace, *arguments: str) -> np.ndarray:
    """The latent that the example samples."""
    inputs = folder / "inputs"
    inputs.mkdir(exist_ok=True)
    guided = "--guidance" in arguments
    np.save(inputs / "noise.npy", start.noise.numpy())
    np.save(inputs / "img_ids.npy", start.ids.numpy())
    for name, value in start.prompt.items():
        np.save(inputs / f"{name}.npy", (torch.cat([start.negative[name], value]) if guided else value).numpy())
    command = [build / "mmdit-sample", bundle, inputs, "-o", folder / "latent.npy"]
    done = subprocess.run(
        [*command, "--steps", str(STEPS), "--shift", str(SHIFT), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"tiny on ort-cpu: {STEPS} steps, {folder / 'latent.npy'}\n"
    return np.load(folder / "latent.npy")


def sampled(bundle: Path, start: SimpleNamespace, *, guided: bool, one_batch: bool) -> Tensor:
    """What Python samples."""
    with Engine.load(bundle) as engine:
        return sample(
            engine,
            start.noise,
            schedule(STEPS, SHIFT),
            grid=start.grid,
            prompt=start.prompt,
            negative=start.negative if guided else None,
            guidance_scale=SCALE if guided else None,
            one_batch=one_batch if guided else None,
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=pytest.mark.soak)])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_the_example_gives_what_python_gives(
    release: Path,
    bundle_of: Callable[..., Path],
    start: SimpleNamespace,
    tmp_path: Path,
    precision: str,
    split: bool,
) -> None:
    bundle = bundle_of(precision, split=split)
    one = run_example(release, bundle, tmp_path, start, "--guidance", str(SCALE))
    two = run_example(release, bundle, tmp_path, start, "--guidance", str(SCALE), "--two-calls")
    assert one.tobytes() == sampled(bundle, start, guided=True, one_batch=True).numpy().tobytes()
    assert two.tobytes() == sampled(bundle, start, guided=True, one_batch=False).numpy().tobytes()


def test_without_guidance_and_under_the_sanitizers_too(
    sanitized: Path, bundle_of: Callable[..., Path], start: SimpleNamespace, tmp_path: Path
) -> None:
    latent = run_example(sanitized, bundle_of(split=True), tmp_path, start)
    expected = sampled(bundle_of(split=True), start, guided=False, one_batch=False).numpy()
    assert latent.tobytes() == expected.tobytes()
    assert not np.array_equal(latent, start.noise.numpy())


def test_noise_levels_and_timesteps_are_pythons(sanitized: Path) -> None:
    none = math.nan
    cases = [
        (steps, shift, last, terminal, scale)
        for steps, shift in itertools.product((1, 2, 3, 4, 7, 20, 28, 50, 100), (0.5, 1.0, 2.5, 3.0, 3.1582))
        for last, terminal, scale in ((none, none, 1.0), (1 / steps, none, 1000.0), (none, 0.02, 1.0))
        if steps > 1 or math.isnan(terminal)
    ]
    cases += [
        (0, 3.0, none, none, 1.0),
        (1, 3.0, none, 0.02, 1.0),
        (4, -1.0, none, none, 1.0),
        (4, 3.0, 1.5, none, 1.0),
    ]
    text = "".join(f"{case[0]} {' '.join(float(x).hex() for x in case[1:])}\n" for case in cases)
    command = [sanitized / "tests/flow-values", "levels"]
    lines = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    for (steps, shift, last, terminal, scale), line in zip(cases, lines, strict=True):
        given = {k: v for k, v in (("last", last), ("terminal", terminal)) if not math.isnan(v)}
        try:
            levels = schedule(steps, shift, **given)
        except UsageError as error:
            assert line == f"UsageError {error.rule}"
            continue
        received = [tuple(map(float.fromhex, pair.split(":"))) for pair in line.split()]
        assert received == list(zip(levels.tolist(), timesteps(levels, scale).tolist(), strict=True)), (steps, shift)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_16_bits_and_back_is_torchs(sanitized: Path, dtype: str) -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype)).float()
    halves = halves[halves.isfinite()]
    # Each number, the ties between neighbours, and what lies just beside them.
    ties = (halves + halves.roll(1)) / 2
    near = torch.cat([ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf))])
    extremes = torch.tensor([65519.99, 65520.0, 3.4e38, math.inf, -math.inf, 1e-8, 1e-45, -0.0])
    values = torch.cat([halves, near, extremes])
    command = [sanitized / "tests/flow-values", "round", dtype]
    output = subprocess.run(command, input=values.numpy().tobytes(), capture_output=True, check=True).stdout
    rounded = values.to(getattr(torch, dtype))
    assert output[: 2 * len(values)] == rounded.view(torch.int16).numpy().tobytes()
    assert output[2 * len(values) :] == rounded.float().numpy().tobytes()
