"""What is exported, and the checks that cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmdit_deploy.build import Target, check_targets
from mmdit_deploy.checkpoint.weights import WeightSource
from mmdit_deploy.contract import Contract, Profile, Range
from mmdit_deploy.errors import UsageError
from mmdit_deploy.lora import Lora, LoraWeights
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

    @property
    def weights(self) -> WeightSource:
        """The weights that are exported and verified: the source's, with the LoRAs merged."""
        return LoraWeights(self.source, self.loras) if self.loras else self.source

    @property
    def directory(self) -> Path:
        """Where the bundle goes."""
        suffix = "-graph" if self.graph_only else ""
        return self.out or Path("dist") / f"{self.spec.name}-{self.precision.name}{suffix}"

    def check(self) -> tuple[tuple[Target, ...], Contract]:
        """The targets and the contract, after the checks that the request alone decides.

        Raises:
            UsageError: the request contradicts itself, or names something that does not exist.
        """
        blocks = self.spec.block_names
        if len(set(self.outputs)) < len(self.outputs) or not set(self.outputs) <= set(blocks):
            single = f", single_blocks.0 to {blocks[-1]}" if self.spec.single_depth else ""
            raise UsageError(
                f"outputs are named blocks.0 to blocks.{self.spec.depth - 1}{single}, each once",
                received=", ".join(ascii(name) for name in self.outputs),
                fix="name blocks of this model",
            )
        targets = check_targets(self.targets, self.precision)
        if self.profiles and not any(target.flavour for target in targets):
            raise UsageError(
                "optimization profiles are TensorRT's",
                received=f"--profile with {', '.join(target.name for target in targets)}",
                fix="drop it, or add a TensorRT target, e.g. --target rtx:sm89",
            )
        if self.segments is not None and (self.graph_only or not any(target.flavour for target in targets)):
            without = "--graph-only" if self.graph_only else ", ".join(target.name for target in targets)
            fix = "one of them" if self.graph_only else "it, or add a TensorRT target, e.g. --target rtx:sm89"
            raise UsageError(
                "segments are what a TensorRT engine is cut into",
                received=f"--segments {self.segments} with {without}",
                fix=f"drop {fix}",
            )
        contract = Contract.of(self.spec, self.precision, self.ranges, outputs=self.outputs, profiles=self.profiles)
        return targets, contract
