"""FP8 and INT8 against NVIDIA Model-Optimizer: the same torch model, the same layers, the same calibration samples.

    python bench/quantization_rival.py [--models digits random] [--steps 8]

The rival goes into an environment of its own, because it brings many packages; torch stays the one that we use:

    python -m venv rival && rival/bin/pip install -e '.[cpu]' nvidia-modelopt torch==2.13.0
    rival/bin/python bench/quantization_rival.py

Both quantize the projections of attentions and the MLPs of our eager MMDiT, whose linear layers are `torch.nn.Linear`,
and both are calibrated on the inputs of one denoising trajectory at three sizes. What is compared is the final output
along another trajectory, from other noise and prompts: every step at every size, against the eager model in fp32.
Everything that is not quantized computes in fp32 on both sides. The rival runs with its published configurations
FP8_DEFAULT_CFG (E4M3, one scale per tensor) and INT8_SMOOTHQUANT_CFG (SmoothQuant; weights per channel, inputs per
tensor), the latter also with SmoothQuant's α = 0.5 in place of its own 1. Ours runs by
`mmdit_deploy.precision.quantize.simulate`, which is what the graph computes: `fp8` and `int8` are what `--fp8` and
`--int8` quantize. `int8` finds its inputs' scales per token, while running; `int8-tensor` calibrates them as the rival
does, and is listed beside it.

Two models: the digits checkpoint, which has learned weights, and a random one of 4 blocks, 768 wide.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from digits_model import CHECKPOINT
from digits_prompts import NUMBERS, TOKENS, WEIGHTS, embed, prompt
from measure import write_result
from torch import Tensor

from mmdit_deploy.calibration.quantization import plan_quantization
from mmdit_deploy.calibration.statistics import Statistics
from mmdit_deploy.calibration.trajectory import Sample, calibrate_trajectory, default_samples
from mmdit_deploy.calibration.what_if import Distance, Part, effects
from mmdit_deploy.checkpoint.keys import parameters
from mmdit_deploy.checkpoint.weights import RandomWeights, WeightSource, open_weights, read_parameter
from mmdit_deploy.eager.programs import programs_of
from mmdit_deploy.model import MMDiT, calls
from mmdit_deploy.precision import PrecisionPlan, QuantizationRecipe
from mmdit_deploy.spec import ModelSpec, precision

RANDOM = ModelSpec("random-4x768", depth=4, num_heads=12, head_dim=64, txt_dim=512, pooled_dim=256)
SIZES = {
    "digits": ((8, 8, TOKENS), (6, 10, TOKENS), (12, 8, TOKENS)),
    "random": ((8, 8, 16), (6, 14, 33), (16, 10, 77)),
}
# By name: ours that it is compared with, the published configuration, and what calibrates in place of its own method.
RIVALS = {
    "Model-Optimizer FP8_DEFAULT_CFG": ("fp8", "FP8_DEFAULT_CFG", None),
    "Model-Optimizer INT8_SMOOTHQUANT_CFG": ("int8", "INT8_SMOOTHQUANT_CFG", None),
    "Model-Optimizer INT8_SMOOTHQUANT_CFG, α 0.5": (
        "int8",
        "INT8_SMOOTHQUANT_CFG",
        {"method": "smoothquant", "alpha": 0.5},
    ),
}
CALIBRATION_SEED, TEST_SEED = 1, 2
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, and what it is calibrated and tested on."""

    name: str
    spec: ModelSpec
    source: WeightSource
    sizes: Sequence[tuple[int, int, int]]
    images: int  # at each size
    weights: str

    def trajectory(self, seed: int, steps: int, programs: Mapping[str, Any]) -> tuple[Statistics, list[Inputs]]:
        """Images at each size: what was seen, and the model's inputs, step after step."""
        samples = default_samples(self.spec, seed, sizes=self.sizes, prompts=self.images)
        if self.name == "digits":
            samples = tuple(_asked(sample, seed, index) for index, sample in enumerate(samples))
        inputs: list[Inputs] = []
        statistics = calibrate_trajectory(
            self.spec,
            self.source,
            torch.float16,
            samples=samples,
            steps=steps,
            programs=programs,
            visit=lambda step, states: inputs.extend(map(dict, states)),
        )
        return statistics, inputs


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    p.add_argument("--steps", type=int, default=8)
    args = p.parse_args()
    import modelopt

    found = {name: compare(_subject(name), args.steps) for name in args.models}
    write_result("quantization_rival", {"rival": f"nvidia-modelopt {modelopt.__version__}", "models": found})


def compare(subject: Subject, steps: int) -> dict[str, Any]:
    """Errors of both on one model, by precision."""
    programs = programs_of(calls(subject.spec), torch.float16)
    statistics, seen = subject.trajectory(CALIBRATION_SEED, steps, programs)
    _, tested = subject.trajectory(TEST_SEED, steps, programs)
    model = _eager(subject.spec, subject.source)
    exact = _outputs(model, tested)
    found: dict[str, Any] = {}
    for name, plan in _plans(subject, statistics).items():
        part = Part(frozenset(plan.linears), frozenset(plan.attentions))
        (effect,) = effects(subject.spec, subject.source, plan, [part], tested, programs=programs)
        found[f"ours {name}"] = _summary(effect.output, tested)
    layers = list(_plans(subject, statistics)["fp8"].linears)
    for rival, (name, config, algorithm) in RIVALS.items():
        quantized = _model_optimizer(model, config, algorithm, layers, seen)
        distances = [Distance.of(a, b) for a, b in zip(_outputs(quantized, tested), exact, strict=True)]
        found[rival] = {**_summary(distances, tested), "against": f"ours {name}"}
        for figure in ("mean_rel_l2", "worst_rel_l2"):
            found[rival][f"ours_of_its_{figure}"] = found[f"ours {name}"][figure] / found[rival][figure]
    print(f"{subject.name}: {len(layers)} linear layers, {len(tested)} inputs, rel-L2 of the final output")
    for name, figures in found.items():
        print(f"  {name:40s} mean {figures['mean_rel_l2']:7.3%}   worst {figures['worst_rel_l2']:7.3%}")
    return {"weights": subject.weights, "linear_layers": len(layers), "errors": found}


def _subject(name: str) -> Subject:
    if name == "digits":
        spec, source = open_weights(CHECKPOINT)
        return Subject(name, spec, source, SIZES[name], images=4, weights="tests/digits/mmdit-digits")
    made_up = RandomWeights(0)
    return Subject(name, RANDOM, made_up, SIZES[name], images=1, weights=made_up.description)


def _asked(sample: Sample, seed: int, index: int) -> Sample:
    """With prompts in words, as the model was trained."""
    count = len(sample.inputs["timestep"])
    prompts = [prompt((3 * seed + 4 * index + 7 * i) % len(NUMBERS), (None, *WEIGHTS)[i % 3]) for i in range(count)]
    text, pooled = embed(prompts)
    return replace(sample, inputs={**sample.inputs, "encoder_hidden_states": text, "pooled_projections": pooled})


def _plans(subject: Subject, statistics: Statistics) -> dict[str, PrecisionPlan]:
    """Ours by name: the same roles in each."""

    def plan(name: str, **table: object) -> PrecisionPlan:
        base = name.partition("-")[0]
        recipe = QuantizationRecipe.default(base).changed({"attention": name, "mlp": name, **table})
        return plan_quantization(subject.spec, precision(base), recipe, statistics, subject.source)

    return {
        "fp8": plan("fp8", fp8_attention=False),
        "fp8 with FP8 attention": plan("fp8", fp8_attention=True),
        "int8": plan("int8"),
        "int8-tensor": plan("int8-tensor"),
    }


def _eager(spec: ModelSpec, source: WeightSource) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(spec)
    state = {p.path: read_parameter(source, p, torch.float32).clone() for p in parameters(spec)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _outputs(model: Callable[..., Any], inputs: Sequence[Inputs]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(**given) for given in inputs]


def _model_optimizer(
    model: MMDiT, config: str, algorithm: object, layers: Sequence[str], samples: Sequence[Inputs]
) -> Any:
    """The model as the rival quantizes it, with a published configuration on these layers alone."""
    import modelopt.torch.quantization as mtq

    published = copy.deepcopy(getattr(mtq, config))
    quantizers = {q["quantizer_name"]: q["cfg"] for q in published["quant_cfg"] if "cfg" in q}
    chosen = [
        {"quantizer_name": f"{path}.{kind}_quantizer", "cfg": quantizers[f"*{kind}_quantizer"]}
        for path in layers
        for kind in ("weight", "input")
    ]
    published["algorithm"] = algorithm or published["algorithm"]
    published["quant_cfg"] = [{"quantizer_name": "*", "enable": False}, *chosen]

    def calibrate(quantized: Any) -> None:
        for given in samples:
            quantized(**given)

    quantized = mtq.quantize(copy.deepcopy(model), published, calibrate)
    enabled = [n for n, m in quantized.named_modules() if n.endswith("_quantizer") and getattr(m, "is_enabled", False)]
    assert len(enabled) == 2 * len(layers), f"{len(enabled)} quantizers for {len(layers)} layers"
    return quantized


def _summary(distances: Sequence[Distance], inputs: Sequence[Inputs]) -> dict[str, Any]:
    worst = Distance.worst(distances)
    return {
        "mean_rel_l2": fmean(d.rel_l2 for d in distances),
        "worst_rel_l2": worst.rel_l2,
        "worst_cosine": worst.cosine,
        "rel_l2": [
            {
                "timestep": round(float(given["timestep"][0]), 2),
                "img_tokens": given["hidden_states"].shape[1],
                "rel_l2": d.rel_l2,
            }
            for given, d in zip(inputs, distances, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
