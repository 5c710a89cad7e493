"""What tests of the digits model share: the judge, and what eager draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmdit_deploy.cli.export import main as mmdit_export
from traces import Traces

IMAGES = 30  # of all ten digits, plain, thin and bold


@pytest.fixture(scope="session")
def data(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    """`bench/digits_data.py`."""
    return bench_module("digits_data")


@pytest.fixture(scope="session")
def trainer(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    """`bench/train_digits.py`, which saves with diffusers."""
    pytest.importorskip("diffusers")
    return bench_module("train_digits")


@pytest.fixture(scope="session")
def judge(digits: ModuleType) -> Any:
    """Who knows digits, and has not seen what the model was trained on."""
    return digits.Judge()


@pytest.fixture(scope="session")
def eager_score(digits: ModuleType, judge: Any) -> Any:
    """What the eager model draws in fp32."""
    return digits.digits_accuracy(digits.eager(), judge, IMAGES)


@pytest.fixture(scope="session")
def captured(digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --calib takes, captured from diffusers' model while it drew digits."""
    pytest.importorskip("diffusers")
    path: Path = tmp_path_factory.mktemp("digits") / "captured.safetensors"
    digits.capture_inputs(path)
    return path


@pytest.fixture(scope="session")
def export_digits(
    digits: ModuleType, captured: Path, traces: Traces, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The digits model's bundle in a precision, calibrated on what was captured, made once a session."""
    made: dict[str, Path] = {}

    def export(precision: str) -> Path:
        if precision not in made:
            out = tmp_path_factory.mktemp("digits") / precision
            calib = [] if precision in ("fp32", "bf16") else [f"--calib={captured}"]
            with traces.within(digits.load().spec):
                assert mmdit_export([*digits.export_arguments(precision, out), *calib]) == 0
            made[precision] = out
        return made[precision]

    return export
