"""`--lora FILE[:SCALE]`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdit_deploy.errors import UsageError
from mmdit_deploy.lora import parse_lora


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-.5", "a.safetensors", -0.5),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("a.safetensors:+1e-1", "a.safetensors", 0.1),
        ("a:b:2", "a:b", 2.0),
    ],
)
def test_file_and_scale(text: str, file: str, scale: float) -> None:
    assert parse_lora(text) == (Path(file), scale)


def test_a_file_with_a_colon_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "style:0.5"
    path.touch()
    assert parse_lora(str(path)) == (path, 1.0)
    assert parse_lora(f"{path}:2") == (path, 2.0)


@pytest.mark.parametrize("text", ["", "a:x", "a:", ":1", "a:nan", "a:inf", "a:1e999", "a:1_0", "a: 1", "a:0.8:", "a:٣"])
def test_a_scale_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="SCALE is a finite number") as caught:
        parse_lora(text)
    assert caught.value.fix and caught.value.received
