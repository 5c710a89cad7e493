"""What a checkpoint's model is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdit_deploy.checkpoint.stored_model import model_name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/models/sd3-medium", "sd3-medium"),
        ("/models/sd3-medium/transformer", "sd3-medium"),
        ("/hub/models--stabilityai--sd3.5-medium/snapshots/b940f6/transformer", "sd3.5-medium"),
        ("/hub/models--stabilityai--stable-diffusion-3.5-medium/snapshots/b940f6", "stable-diffusion-3.5-medium"),
        ("/snapshots/mine", "mine"),
        ("/models/flux1-dev.safetensors", "flux1-dev"),
        ("/hub/models--x--flux/snapshots/b940f6/flux1-dev.sft", "flux1-dev"),
        ("/hub/models--x--flux/snapshots/b940f6/transformer/diffusion_pytorch_model.safetensors", "flux"),
    ],
)
def test_a_model_is_called_what_its_folder_or_file_is(folder: str, name: str) -> None:
    assert model_name(Path(folder)) == name
