"""What was built, as data: a TensorRT target's entry in the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdit_deploy.build.floor import Floor
from mmdit_deploy.contract import Profile, TensorSpec, profile_from_json, profile_to_json


@dataclass(frozen=True)
class SegmentRecord:
    """One engine file: a run of the model's calls.

    Args:
        file: relative to the bundle, e.g. ``engines/rtx-sm89/segment-0.engine``.
        nbytes: its size.
        calls: the model's calls that it makes, in order, e.g. ``("conditioning", …, "blocks.11")``.
        inputs, outputs: its tensors. What is none of the contract's comes from, or goes to, another segment.
        kernels_by_type, kernels_by_call: counted in its layer list.
        fused_attentions: fused attention kernels by block.
        seconds: that building it took.
        activation_bytes: memory that running it takes besides weights, at the largest sizes; None where TensorRT does
            not say.
        fp8_attentions: how many of these are in FP8, by block; none where there are none.
        quantized_products: products of quantized weights by call and, within it, by scheme (``fp8``); under ``engine``
            those of no call: one for all modulations.
        floors: by profile, what each block moves and computes at least at the opt shape; none where a version wrote the
            record that did not know it.
    """

    file: str
    nbytes: int
    calls: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kernels_by_type: Mapping[str, int]
    kernels_by_call: Mapping[str, int]
    fused_attentions: Mapping[str, int]
    seconds: float
    activation_bytes: int | None = None
    floors: tuple[Mapping[str, Floor], ...] = ()
    fp8_attentions: Mapping[str, int] = field(default_factory=dict)
    quantized_products: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def kernels(self) -> int:
        return sum(self.kernels_by_type.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "bytes": self.nbytes,
            "calls": list(self.calls),
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "kernels": {
                "total": self.kernels,
                "by_type": dict(self.kernels_by_type),
                "by_call": dict(self.kernels_by_call),
            },
            "fused_attentions": dict(self.fused_attentions),
            "fp8_attentions": dict(self.fp8_attentions),
            "quantized_products": {call: dict(schemes) for call, schemes in self.quantized_products.items()},
            "seconds": round(self.seconds, 1),
            "activation_bytes": self.activation_bytes,
            "floors": [{call: floor.to_json() for call, floor in floors.items()} for floors in self.floors],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SegmentRecord:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return SegmentRecord(
            data["file"],
            data["bytes"],
            tuple(data["calls"]),
            tuple(TensorSpec.from_json(t) for t in data["inputs"]),
            tuple(TensorSpec.from_json(t) for t in data["outputs"]),
            data["kernels"]["by_type"],
            data["kernels"]["by_call"],
            data["fused_attentions"],
            data["seconds"],
            data.get("activation_bytes"),
            tuple(
                {call: Floor.from_json(floor) for call, floor in floors.items()} for floors in data.get("floors") or ()
            ),
            data.get("fp8_attentions") or {},
            data.get("quantized_products") or {},
        )


@dataclass(frozen=True)
class EngineRecord:
    """One TensorRT target of a bundle: its engine files, which run as a chain, and what they fit.

    Args:
        target: e.g. ``rtx:sm89``.
        flavour: ``TensorRT-RTX`` or ``TensorRT``.
        version: of it; the engines run in no other.
        capabilities: compute capabilities as CUDA writes them, e.g. ``("8.9",)``.
        execution: how it computes, in words.
        attention: ``fused``, or ``written out`` where the flavour has no fused kernel for the precision.
        profiles: optimization profiles, each with a range by axis; the runtime takes the first that fits a call.
        segments: in the order in which they run.
    """

    target: str
    flavour: str
    version: str
    capabilities: tuple[str, ...]
    execution: str
    attention: str
    profiles: tuple[Profile, ...]
    segments: tuple[SegmentRecord, ...]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.segments)

    @property
    def activation_bytes(self) -> int | None:
        """Memory that running it takes besides weights: of the segment that takes most."""
        known = [s.activation_bytes for s in self.segments if s.activation_bytes is not None]
        return max(known) if known and len(known) == len(self.segments) else None

    @property
    def kernels(self) -> int:
        """Kernels of all segments; of several profiles, those of all together."""
        return sum(s.kernels for s in self.segments)

    @property
    def kernels_by_type(self) -> Counter[str]:
        return sum((Counter(s.kernels_by_type) for s in self.segments), Counter[str]())

    @property
    def kernels_by_call(self) -> Counter[str]:
        return sum((Counter(s.kernels_by_call) for s in self.segments), Counter[str]())

    @property
    def fused_attentions(self) -> Counter[str]:
        """Fused attention kernels by block, of one profile."""
        return Counter({block: count for s in self.segments for block, count in s.fused_attentions.items()})

    @property
    def fp8_attentions(self) -> Counter[str]:
        """Those of them that are in FP8."""
        return Counter({block: count for s in self.segments for block, count in s.fp8_attentions.items()})

    @property
    def quantized_by_scheme(self) -> Counter[str]:
        """Products of quantized weights in one profile, by scheme; that of all modulations is one."""
        calls = (schemes for s in self.segments for schemes in s.quantized_products.values())
        return sum((Counter(schemes) for schemes in calls), Counter[str]())

    def to_json(self) -> dict[str, Any]:
        return {
            "execution": self.execution,
            "flavour": self.flavour,
            "version": self.version,
            "capabilities": list(self.capabilities),
            "attention": self.attention,
            "profiles": [profile_to_json(p) for p in self.profiles],
            "bytes": self.nbytes,
            "activation_bytes": self.activation_bytes,
            "kernels": {
                "total": self.kernels,
                "by_type": dict(self.kernels_by_type),
                "by_call": dict(self.kernels_by_call),
            },
            "fused_attentions": dict(self.fused_attentions),
            "fp8_attentions": dict(self.fp8_attentions),
            "quantized_products": dict(self.quantized_by_scheme),
            "segments": [s.to_json() for s in self.segments],
        }

    @staticmethod
    def from_json(target: str, data: Mapping[str, Any]) -> EngineRecord:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return EngineRecord(
            target,
            data["flavour"],
            data["version"],
            tuple(data["capabilities"]),
            data["execution"],
            data["attention"],
            tuple(profile_from_json(p) for p in data["profiles"]),
            tuple(SegmentRecord.from_json(s) for s in data["segments"]),
        )
