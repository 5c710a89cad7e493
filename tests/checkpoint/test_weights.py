"""What a checkpoint's model is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdit_deploy.checkpoint.weights import model_name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/models/sd3-medium", "sd3-medium"),
        ("/models/sd3-medium/transformer", "sd3-medium"),
        ("/hub/models--stabilityai--sd3.5-medium/snapshots/b940f6/transformer", "sd3.5-medium"),
        ("/hub/models--stabilityai--stable-diffusion-3.5-medium/snapshots/b940f6", "stable-diffusion-3.5-medium"),
        ("/snapshots/mine", "mine"),
    ],
)
def test_a_model_is_called_what_its_folder_is(folder: str, name: str) -> None:
    assert model_name(Path(folder)) == name
