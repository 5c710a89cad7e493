"""Trains the small text-to-image MMDiT whose checkpoint is test data: random weights say little about quantization.

    python bench/train_digits.py                    the checkpoint in tests/digits, and training.json beside it
    python bench/train_digits.py --steps 100 OUT    shorter, elsewhere

Rectified flow with logit-normal timesteps (SD3 paper, arXiv:2403.03206, section 3.1), AdaLN-Zero, RMSNorm on Q and K,
one prompt in ten left out for classifier-free guidance, and an exponential moving average of the weights. The data are
scikit-learn's 8×8 digits: the half that the judge does not see. On two cores it takes less than ten minutes.

The same seed gives the same bits on the same machine with the same number of threads; elsewhere, an equally good model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_data import Digits, Judge, halves, to_latent
from digits_model import CHECKPOINT, CONFIG, digits_accuracy, eager
from digits_prompts import NO_PROMPT, embed, prompt
from torch import Tensor, nn

from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.families import POSITION_TABLE, spec_from_config
from mmdit_deploy.model import MMDiT
from mmdit_deploy.sampling import timesteps

BATCH = 64
LEARNING_RATE, WARMUP = 1e-3, 50
DECAY_FROM = 0.5  # of the steps: from there on the learning rate falls to 0
EMA = 0.998
DROPPED = 0.1  # prompts, so that the model knows what it does without one
WEIGHTED = 0.5  # of thin and bold digits, how many say so
SCORED = 300


@dataclass(frozen=True)
class Batch:
    """What one step learns from: images with their prompts, noise, and how much of it.

    Args:
        images, noise: [B, 64, 1].
        sigma: [B], 0 to 1.
        tokens, pooled: the embedded prompts.
    """

    images: Tensor
    noise: Tensor
    sigma: Tensor
    tokens: Tensor
    pooled: Tensor


def new_model(config: dict[str, Any]) -> MMDiT:
    """A model as the DiT paper starts it (arXiv:2212.09748): modulations and head are zero, so that every block is the
    identity.
    """
    model = MMDiT(spec_from_config(config, "digits"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            if "modulation" in name or name.startswith("final"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
    return model


def batches(data: Digits, steps: int, generator: torch.Generator) -> Iterator[Batch]:
    """Random batches; what is drawn depends on the generator alone."""
    images, weights = to_latent(data.images), data.weights
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        chances = torch.rand(2, BATCH, generator=generator)
        prompts = []
        for i, dropped, weighted in zip(chosen.tolist(), *chances.tolist(), strict=True):
            words = prompt(int(data.digits[i]), weights[i] if weighted < WEIGHTED else None)
            prompts.append(NO_PROMPT if dropped < DROPPED else words)
        noise = torch.randn(BATCH, *images.shape[1:], generator=generator)
        sigma = torch.randn(BATCH, generator=generator).sigmoid()  # logit-normal
        yield Batch(images[chosen], noise, sigma, *embed(prompts))


def flow_loss(model: MMDiT, batch: Batch) -> Tensor:
    """How far the velocity is from the way from the image to the noise, squared."""
    sigma = batch.sigma[:, None, None]
    x = (1 - sigma) * batch.images + sigma * batch.noise
    velocity = model(x, batch.tokens, timesteps(batch.sigma), batch.pooled)
    return (velocity - (batch.noise - batch.images)).square().mean()


def learning_rate(step: int, steps: int) -> float:
    """Up in `WARMUP` steps, level, and then down to zero."""
    left = (steps - step) / (steps * (1 - DECAY_FROM))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP, left)


def train(data: Digits, steps: int, seed: int) -> tuple[MMDiT, list[float]]:
    """Trains a model.

    Returns:
        The model with averaged weights, and the loss of each step.
    """
    torch.manual_seed(seed)
    model = new_model(CONFIG)
    averaged = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step, batch in enumerate(batches(data, steps, torch.Generator().manual_seed(seed))):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = flow_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-100:]):.4f}", file=sys.stderr, flush=True)
    return averaged, losses


@torch.inference_mode()
def unseen_loss(model: MMDiT, data: Digits) -> float:
    """The loss on images that the model was not trained on, with noise of its own."""
    return float(np.mean([flow_loss(model, b).item() for b in batches(data, 10, torch.Generator().manual_seed(1))]))


def save(model: MMDiT, folder: Path) -> int:
    """Writes a diffusers folder, through diffusers' own class; returns the bytes of the weights.

    Weights are in fp16. The table of positions is no weight, and stays in fp32 as it was computed: diffusers takes it
    as it is stored, and we compute it.
    """
    import diffusers

    theirs: Any = getattr(diffusers, CONFIG["_class_name"])(**{k: v for k, v in CONFIG.items() if k[0] != "_"})
    ours = model.state_dict()
    state = {POSITION_TABLE: theirs.state_dict()[POSITION_TABLE]}
    for parameter in parameters(model.spec):
        split = ours[parameter.path].split([part.shape[0] for part in parameter.parts])
        state |= {part.key: t.reshape(part.shape) for part, t in zip(parameter.parts, split, strict=True)}
    theirs.load_state_dict(state, strict=True)
    for weight in theirs.parameters():
        weight.data = weight.data.half()
    theirs.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def versions() -> dict[str, str]:
    """Of what a training run depends on."""
    import diffusers
    import sklearn

    modules = {"torch": torch, "numpy": np, "scikit-learn": sklearn, "diffusers": diffusers}
    return {"python": sys.version.split()[0], **{name: module.__version__ for name, module in modules.items()}}


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints one line of JSON, which is also written beside the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the digits model.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scored", type=int, default=SCORED, help="images that the judge sees in the end")
    parser.add_argument("out", type=Path, nargs="?", default=CHECKPOINT, help="the folder (default tests/digits/…)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    seen, unseen = halves()
    start, cpu = time.perf_counter(), time.process_time()
    model, losses = train(seen, args.steps, args.seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    weight_bytes = save(model, args.out)
    score = digits_accuracy(eager(args.out), Judge(), args.scored)
    record = {
        "command": f"python bench/train_digits.py --steps {args.steps} --seed {args.seed} --threads {args.threads}",
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weight_bytes,
        "loss": round(float(np.mean(losses[-100:])), 4),
        "loss_unseen": round(unseen_loss(model, unseen), 4),
        "images_judged": args.scored,
        "accuracy": round(score.accuracy, 4),
        "weight_accuracy": round(score.weight_accuracy, 4),
        "versions": versions(),
    }
    (args.out.parent / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
