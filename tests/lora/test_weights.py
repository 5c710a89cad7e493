"""Merged weights as a source: nothing is touched without need, and everything is added in fp32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_deploy.checkpoint.weights import RandomWeights, stream_parts
from mmdit_deploy.errors import CheckpointError, UsageError
from mmdit_deploy.lora import LoraWeights, open_lora

MODULE = "transformer_blocks.0.attn.to_q"
KEY = f"{MODULE}.weight"


@pytest.fixture
def lora(write: Callable[..., Path], make_pair: Callable[..., dict[str, Tensor]]) -> Path:
    return write({**make_pair(f"transformer.{MODULE}", 64, 64, 4), f"transformer.{MODULE}.alpha": torch.tensor(2.0)})


def test_scale_0_changes_no_bit(tiny: Callable[[str], Any], lora: Path) -> None:
    it = tiny("flux1")
    for key, tensor in it.merged((lora, 0.0), (lora, -0.0)).items():
        assert tensor.data_ptr() == it.source.state[key].data_ptr(), key


def test_the_source_is_left_as_it_is(tiny: Callable[[str], Any], lora: Path) -> None:
    it = tiny("flux1")
    before = it.source.state[KEY].clone()
    merged = it.merged((lora, 1.0), (lora, 0.5))
    assert torch.equal(it.source.state[KEY], before)
    torch.testing.assert_close(merged[KEY] - before, 1.5 * (it.merged((lora, 1.0))[KEY] - before))


def test_what_is_added_and_taken_off_is_gone(tiny: Callable[[str], Any], lora: Path) -> None:
    it = tiny("sd3")
    merged = it.merged((lora, 0.75), (lora, -0.75))
    torch.testing.assert_close(merged[KEY], it.source.state[KEY], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(tiny: Callable[[str], Any], lora: Path, dtype: torch.dtype) -> None:
    """A 16-bit checkpoint: the sum is fp32, and rounded where the weights file is written."""
    it = tiny("flux1")
    source = it.source
    source.state = {key: tensor.to(dtype) for key, tensor in source.state.items()}
    ours = LoraWeights(source, [open_lora(lora, it.spec)])
    written = dict(stream_parts(it.spec, ours, dtype))
    widened = it.source
    widened.state = {key: tensor.float() for key, tensor in source.state.items()}
    exact = dict(stream_parts(it.spec, LoraWeights(widened, [open_lora(lora, it.spec)]), torch.float32))
    assert torch.equal(written[KEY], exact[KEY].to(dtype))
    assert not torch.equal(written[KEY], source.state[KEY])
    other = f"{MODULE.replace('to_q', 'to_k')}.weight"
    assert written[other].data_ptr() == source.state[other].data_ptr()


def test_random_weights_stay_random(tiny: Callable[[str], Any], lora: Path) -> None:
    it = tiny("qwen-image")
    source = LoraWeights(RandomWeights(7), [open_lora(lora, it.spec, 0.8)])
    assert source.description == f"random (seed 7) + LoRA {lora} × 0.8"
    part = next(part for part in it.parts if part.key == KEY)
    assert not torch.equal(source.part(part), RandomWeights(7).part(part))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_not_finite(
    tiny: Callable[[str], Any],
    write: Callable[..., Path],
    make_pair: Callable[..., dict[str, Tensor]],
    value: float,
    factor: str,
) -> None:
    tensors = make_pair(f"transformer.{MODULE}", 64, 64, 4)
    key = f"transformer.{MODULE}.lora_{factor}.weight"
    tensors[key][1, 1] = value
    with pytest.raises(CheckpointError, match=key):
        tiny("flux1").merged((write(tensors), 1.0))


def test_sums_beyond_the_range(tiny: Callable[[str], Any], lora: Path) -> None:
    it = tiny("flux1")
    ours = LoraWeights(it.source, [open_lora(lora, it.spec, 1e6)])
    with pytest.raises(CheckpointError, match=KEY):
        dict(stream_parts(it.spec, ours, torch.float16))


@pytest.mark.parametrize("scale", [1e7, -1e300, float("inf"), float("nan")])
def test_a_scale_that_is_none(tiny: Callable[[str], Any], lora: Path, scale: float) -> None:
    with pytest.raises(UsageError, match="the scale of a LoRA"):
        open_lora(lora, tiny("flux1").spec, scale)


def test_what_the_manifest_says(tiny: Callable[[str], Any], lora: Path) -> None:
    assert open_lora(lora, tiny("flux1").spec, 0.8).to_json() == {
        "file": str(lora),
        "resolved": str(lora.resolve()),
        "sha256": hashlib.sha256(lora.read_bytes()).hexdigest(),
        "scale": 0.8,
        "ranks": [4],
        "alphas": [2.0],
        "keys": [KEY],
        "ignored_text_encoder_keys": 0,
    }
