"""What is exported, and what follows from that alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmdit_deploy.checkpoint.weights import RandomWeights, WeightSource
from mmdit_deploy.contract import Contract, Profile, Range
from mmdit_deploy.lora import Lora, LoraWeights
from mmdit_deploy.precision import SCHEMES, PrecisionPlan, Scheme
from mmdit_deploy.precision.recipe import QuantizationRecipe, fitted
from mmdit_deploy.precision.structure import structure
from mmdit_deploy.spec import ModelSpec, Precision


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and where to.

    Args:
        spec: the architecture.
        source: its weights, without LoRAs.
        precision: the compute type.
        targets: engines to build, e.g. ``("ort-cpu", "rtx:sm89")``.
        out: the bundle's directory; by default ``dist/<name>-<precision>``.
        ranges: by axis; the contract's defaults where not given.
        profiles: TensorRT's optimization profiles, by axis; by default one that spans the ranges.
        segments: engines that a TensorRT target is cut into; None for as few as fit into memory.
        outputs: block outputs to expose, e.g. ``("blocks.12",)``.
        recipe: name of the recipe that the arguments came from.
        force: replace an existing bundle.
        verify: compare the engines with the eager model; without, the bundle says that it was not verified.
        thorough: verify more and larger shapes.
        graph_only: stop at the graphs; no weights are written, nothing can run.
        loras: merged into the weights, opened for the same architecture.
        quantization: what is quantized, by role; None for what the precision does by itself.
        fp16_plan: ``auto`` keeps in fp32 what calibration says must be, ``pure`` nothing. None is ``auto`` with a
            checkpoint and ``pure`` with random weights, which say nothing about ranges.
        calib: inputs captured from the user's own pipeline, to calibrate on; None for denoising trajectories of the
            eager model.
        scales: another bundle's ``calibration.safetensors``, whose scales are taken over.
        budget: quantize as much as keeps the final output's relative L2 error within this.
        split_conditioning: two graphs and engines: one makes the modulation of a whole schedule, the other runs a step
            without the weights of that.
    """

    spec: ModelSpec
    source: WeightSource
    precision: Precision
    targets: Sequence[str] = ("ort-cpu",)
    out: Path | None = None
    ranges: Mapping[str, Range] = field(default_factory=dict)
    profiles: Sequence[Profile] = ()
    segments: int | None = None
    outputs: tuple[str, ...] = ()
    recipe: str | None = None
    force: bool = False
    verify: bool = True
    thorough: bool = False
    graph_only: bool = False
    loras: Sequence[Lora] = ()
    quantization: QuantizationRecipe | None = None
    fp16_plan: Literal["auto", "pure"] | None = None
    calib: Path | None = None
    scales: Path | None = None
    budget: float | None = None
    split_conditioning: bool = False

    @property
    def weights(self) -> WeightSource:
        """The weights that are exported and verified: the source's, with the LoRAs merged."""
        return LoraWeights(self.source, self.loras) if self.loras else self.source

    @property
    def directory(self) -> Path:
        """Where the bundle goes."""
        suffix = "-graph" if self.graph_only else ""
        return self.out or Path("dist") / f"{self.spec.name}-{self.precision.label}{suffix}"

    @property
    def quantizes(self) -> QuantizationRecipe | None:
        """What is quantized; None where the precision quantizes nothing."""
        if not self.precision.quantized:
            return None
        recipe = self.quantization or QuantizationRecipe.default(self.precision.name)
        contract = Contract.of(self.spec, self.precision, self.ranges, profiles=self.profiles)
        for ranges in (contract.ranges, *contract.profiles):
            recipe = fitted(recipe, ranges, self.spec)
        return recipe

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """How linear layers are quantized, and FP8 where attentions are."""
        recipe = self.quantizes
        if recipe is None:
            return ()
        attention = (SCHEMES["fp8"],) if recipe.fp8_attention else ()
        return tuple(dict.fromkeys((*recipe.schemes.values(), *attention)))

    @property
    def leaves_attention(self) -> bool:
        """Whether attentions were to be in FP8, and are not: TensorRT fuses none for so few tokens."""
        asked = self.quantization or (QuantizationRecipe.default(self.precision.name) if self.quantizes else None)
        return (
            asked is not None
            and asked.fp8_attention
            and self.quantizes is not None
            and not self.quantizes.fp8_attention
        )

    @property
    def seeks_islands(self) -> bool:
        """Whether calibration decides what stays in fp32."""
        chosen = self.fp16_plan or ("pure" if isinstance(self.source, RandomWeights) else "auto")
        return self.precision.base == "fp16" and chosen == "auto" and not self.graph_only

    @property
    def structure(self) -> PrecisionPlan:
        """The plan's tensors, before anything is calibrated."""
        return structure(self.spec, self.precision, self.quantizes)
