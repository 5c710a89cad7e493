"""Tiny models of all families, each with everything that calls of its family can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from mmdit_deploy.spec import ModelSpec


@pytest.fixture(scope="session")
def tiny_models(tiny_spec: ModelSpec, tiny_families: Mapping[str, ModelSpec]) -> Mapping[str, ModelSpec]:
    """A model of each family, by name."""
    sd3 = dataclasses.replace(tiny_spec, name="tiny-sd3", residuals=1, dual_attention_blocks=(0,))
    names = ("flux1", "flux2", "qwen-image-edit-2511")
    return {"sd3": sd3} | {name: tiny_families[name] for name in names}
