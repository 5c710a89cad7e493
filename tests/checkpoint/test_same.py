"""Which architectures are those of one checkpoint, and what is said of two that are not."""

from __future__ import annotations

import dataclasses

import pytest

from mmdit_deploy.checkpoint.same import check_same
from mmdit_deploy.errors import UsageError
from mmdit_deploy.families import PRESETS, with_residuals

SD3, FLUX = PRESETS["sd3-medium"], PRESETS["flux1-dev"]


def refusal(*specs: object, **options: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check_same(*specs, "they must be one", fix="pass it", **options)  # type: ignore[arg-type]
    return caught.value


def test_what_the_export_adds_is_not_the_checkpoints() -> None:
    steered = with_residuals(SD3, 6)
    assert steered.differences(SD3) == SD3.differences(steered) == {}
    check_same(dataclasses.replace(SD3, name="mine"), steered, "", fix="")


def test_fields_that_differ_are_named_with_both_values() -> None:
    other = dataclasses.replace(SD3, depth=12, pos_table=True)
    assert other.differences(SD3) == {"depth": (12, 24), "pos_table": (True, False)}
    assert refusal(other, SD3).received == "depth 12, expected 24, pos_table True, expected False"
    assert refusal(other, SD3, besides=("pos_table",)).received == "depth 12, expected 24"


def test_of_another_family_only_the_families_are_said() -> None:
    said = refusal(FLUX, SD3)
    assert said.received == "a FLUX.1 model; sd3-medium is of Stable Diffusion 3 / 3.5" and said.fix == "pass it"
