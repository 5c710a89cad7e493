"""What tests of the digits model share: the judge, and what eager draws."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

IMAGES = 60  # of all ten digits, plain, thin and bold: two of each


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
