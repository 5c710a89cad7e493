"""The digits model: where it is, how it is sampled, and how well what it makes is what was asked for.

    prompts ─► embed ─┐
    noise ────────────┴─► guided Euler steps with any model ─► images ─► judge ─► Score

A model is a callable that takes the contract's inputs in fp32 and returns the velocity: the eager model and an engine
alike, so that they are scored by the same code on the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_data import SIDE, Judge, to_images
from digits_prompts import NO_PROMPT, NUMBERS, TOKENS, WEIGHTS, WIDTH, embed, prompt
from torch import Tensor

from mmdit_deploy.calibration.capture import capture
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import open_weights, read_parameter
from mmdit_deploy.contract import Range
from mmdit_deploy.eager.inputs import noise
from mmdit_deploy.model import MMDiT, grid_ids
from mmdit_deploy.runtime import Engine
from mmdit_deploy.sampling import guided_in_one_batch, schedule, timesteps, trajectory

CHECKPOINT = Path(__file__).resolve().parent.parent / "tests" / "digits" / "mmdit-digits"
CONFIG: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": SIDE,
    "patch_size": 1,  # 64 image tokens
    "in_channels": 1,
    "num_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 128,
    "pooled_projection_dim": WIDTH,
    "out_channels": 1,
    "pos_embed_max_size": 2 * SIDE,
    "dual_attention_layers": (),
    "qk_norm": "rms_norm",
}
STEPS, SHIFT, GUIDANCE = 12, 3.0, 3.0
AT_ONCE = 30  # images; the model sees twice as many, without and with the prompt
# What an export must be able to take; other sizes than 8×8 are there for verification.
RANGES = {
    "batch": Range(1, 2 * AT_ONCE, 2 * AT_ONCE),
    "img_tokens": Range(16, SIDE * SIDE, 4 * SIDE * SIDE),
    "txt_tokens": Range(2, TOKENS, 4 * TOKENS),
}
# How many points of accuracy a precision may lose against eager.
POINTS = {"fp32": 1, "fp16": 1, "bf16": 1, "fp8": 2, "int8": 2, "fp4": 4, "w4a16": 4}

Model = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Score:
    """How well images are what was asked for.

    Args:
        accuracy: share of the images that show the digit that was asked for.
        weight_accuracy: share of those asked to be thin or bold that are.
        images: ink, [B, 64], 0 to 16.
        latents: after each step, [steps, B, 64, 1].
    """

    accuracy: float
    weight_accuracy: float
    images: np.ndarray
    latents: Tensor


def eager(folder: Path = CHECKPOINT) -> Model:
    """The eager model in fp32."""
    model = load(folder)
    return lambda inputs: model(**inputs)


def engine(opened: Engine) -> Model:
    """An engine, which takes and gives its contract's types."""
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in opened.contract.inputs}
    return lambda inputs: opened({name: tensor.to(dtypes[name]) for name, tensor in inputs.items()})["sample"]


def in_diffusers(transformer: Any) -> Model:
    """diffusers' own model, which takes and gives images: here a patch is a pixel, so that tokens are their rows."""

    def model(inputs: Mapping[str, Tensor]) -> Tensor:
        given = {name: tensor for name, tensor in inputs.items() if name != "img_ids"}
        given["hidden_states"] = given["hidden_states"].transpose(1, 2).unflatten(2, (SIDE, SIDE))
        (velocity,) = transformer(**given, return_dict=False)
        return velocity.flatten(2).transpose(1, 2)

    return model


def capture_inputs(path: Path, folder: Path = CHECKPOINT, count: int = AT_ONCE) -> None:
    """Writes what ``--calib`` takes: inputs of diffusers' model while it draws digits, from other noise than is scored.

    Args:
        path: the new file.
        folder: the checkpoint.
        count: of images.
    """
    import diffusers

    transformer = getattr(diffusers, CONFIG["_class_name"]).from_pretrained(folder, torch_dtype=torch.float32).eval()
    prompts = [prompt(d, w) for d, w in zip(*questions(count), strict=True)]
    with capture(transformer, path):
        generate(in_diffusers(transformer), prompts, noise(1, "calibration", (count, SIDE * SIDE, 1)))


def load(folder: Path = CHECKPOINT) -> MMDiT:
    """Our eager model in fp32, with a checkpoint's weights."""
    spec, source = open_weights(folder)
    with torch.device("meta"):
        model = MMDiT(spec)
    state = {p.path: read_parameter(source, p, torch.float32) for p in parameters(spec)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def export_arguments(precision: str, out: Path, folder: Path = CHECKPOINT) -> list[str]:
    """What `mmdit-export` is called with: a bundle for ONNX Runtime that takes what `generate` gives it."""
    ranges = [f"--{axis.replace('_', '-')}={range_}" for axis, range_ in RANGES.items()]
    return [str(folder), f"--{precision}", "--target=ort-cpu", "--no-verify", *ranges, "--out", str(out)]


def step_errors(latents: Tensor, reference: Tensor) -> list[float]:
    """How far latents are from others after each step, over all images: relative L2 of [steps, B, 64, 1]."""
    return ((latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).tolist()


def questions(count: int) -> tuple[list[int], list[str | None]]:
    """What is asked for: all ten digits in turn; ten plain, then ten thin, then ten bold, and so on."""
    digits = [i % len(NUMBERS) for i in range(count)]
    kinds = (None, *WEIGHTS)
    return digits, [kinds[i // len(NUMBERS) % len(kinds)] for i in range(count)]


def generate(model: Model, prompts: Sequence[str], start: Tensor, *, steps: int = STEPS) -> Tensor:
    """Sample images with guidance.

    Args:
        model: takes the contract's inputs in fp32.
        prompts: B of them.
        start: noise [B, 64, 1] fp32.

    Returns:
        The latents after each step, [steps, B, 64, 1] fp32; the last are the images.
    """
    img_ids, sigmas = grid_ids(SIDE, SIDE), schedule(steps, SHIFT)
    chunks = []
    for first in range(0, len(prompts), AT_ONCE):
        chunk = list(prompts[first : first + AT_ONCE])
        tokens, pooled = embed([NO_PROMPT] * len(chunk) + chunk)

        def velocity(x: Tensor, sigma: Tensor, tokens: Tensor = tokens, pooled: Tensor = pooled) -> Tensor:
            return model(
                {
                    "hidden_states": x,
                    "encoder_hidden_states": tokens,
                    "timestep": timesteps(sigma),
                    "pooled_projections": pooled,
                    "img_ids": img_ids,
                }
            )

        guided = guided_in_one_batch(velocity, GUIDANCE)
        taken = trajectory(guided, start[first : first + AT_ONCE], sigmas)
        chunks.append(torch.stack([step.x_next for step in taken]))
    return torch.cat(chunks, dim=1)


def digits_accuracy(model: Model, judge: Judge, count: int, *, steps: int = STEPS) -> Score:
    """Make images of all ten digits, plain, thin and bold, from fixed noise, and have them judged.

    Args:
        model: takes the contract's inputs in fp32.
        judge: who knows digits and has seen nothing of the model.
        count: of images; a multiple of 30 asks for everything equally often.
    """
    digits, weights = questions(count)
    prompts = [prompt(d, w) for d, w in zip(digits, weights, strict=True)]
    latents = generate(model, prompts, noise(0, "digits", (count, SIDE * SIDE, 1)), steps=steps)
    images, asked = to_images(latents[-1]), np.array(digits)
    weighted = [
        judge.has_weight(images[i : i + 1], asked[i : i + 1], weight)[0] for i, weight in enumerate(weights) if weight
    ]
    return Score(float((judge.shows(images) == asked).mean()), float(np.mean(weighted)), images, latents)
