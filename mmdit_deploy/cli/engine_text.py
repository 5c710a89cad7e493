"""TensorRT engines, in words: what `mmdit-inspect` says of an engine file, and of a bundle's TensorRT targets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmdit_deploy.build import EngineRecord, SegmentRecord
from mmdit_deploy.build.layers import EngineLayer, kernels_by_call, kernels_by_type
from mmdit_deploy.build.layers_file import FILE_NAME
from mmdit_deploy.cli.plain import in_units, plain, shown_axes, titled
from mmdit_deploy.cli.runs import first_to_last, runs
from mmdit_deploy.cli.traffic_text import traffic_text

_LISTED = 12  # kinds of kernel
# Myelin's own names: the operations in the kernel, and a suffix for each kernel. Others are named after ONNX nodes.
_GENERATED = re.compile(r"(__myl_\w+?|_gemm_mha_v2)(_myl\d+_\d+)?")


def _quantized(segment: SegmentRecord) -> str:
    """Products of quantized weights and FP8 attentions, read off the layer list."""
    schemes = list(dict.fromkeys(s for by_scheme in segment.quantized_products.values() for s in by_scheme))
    if not schemes and not segment.fp8_attentions:
        return ""
    by_scheme = [{call: found.get(s, 0) for call, found in segment.quantized_products.items()} for s in schemes]
    counted = runs(segment.calls, *by_scheme, segment.fp8_attentions)
    rows = [(run.name, run.calls, *run.counts) for run in counted if any(run.counts)]
    return titled(
        "quantized, of each: products by scheme, and attentions in FP8",
        [("call", "calls", *schemes, "fp8 attentions"), *rows],
    )


def _activations(segment: SegmentRecord) -> str:
    known = segment.activation_bytes
    return "not said" if known is None else f"{in_units(known)} besides weights, at the largest sizes"


def engine_file_text(data: dict[str, Any]) -> list[str]:
    """Sections about one engine file.

    Args:
        data: what `describe_engine` gave.
    """
    record = EngineRecord.from_json(data["target"], data["engine"])
    segment = record.segments[data["segment"]]
    tensors = [
        (role, tensor.name, shown_axes(tensor.axes), tensor.dtype)
        for role, tensors in (("input", segment.inputs), ("output", segment.outputs))
        for tensor in tensors
    ]
    layers = [EngineLayer.from_json(layer) for layer in data["layers"]]
    plans = [[layer for layer in layers if layer.profile == i] for i in range(len(record.profiles))]
    by_type = [kernels_by_type(plan) for plan in plans]
    by_call = [kernels_by_call(plan, segment.calls) for plan in plans]
    columns = [f"profile {i}" for i in range(len(plans))] if len(plans) > 1 else ["kernels"]
    names = Counter(_operations(layer) for layer in layers if layer.is_kernel)
    return [
        f"engine {plain(data['path'])}: {in_units(segment.nbytes)}, the file that was built; read from its "
        f"{FILE_NAME}, not deserialized",
        titled(
            "built",
            [
                ("target", record.target),
                ("for", _built_for(record)),
                ("execution", record.execution),
                ("segment", f"{data['segment'] + 1} of {len(record.segments)}"),
                ("calls", f"{first_to_last(segment.calls)} ({len(segment.calls)})"),
                ("in", f"{segment.seconds:.1f} s"),
                ("activations", _activations(segment)),
            ],
        ),
        titled("inputs and outputs", tensors),
        profiles_text(data["engine"]["profiles"]),
        titled(
            "kernels by type",
            [
                ("type", *columns),
                *(
                    (kind, *(counts.get(kind, 0) for counts in by_type))
                    for kind, _ in _by_type(segment.kernels_by_type)
                ),
                ("all", *(sum(counts.values()) for counts in by_type)),
            ],
        ),
        titled(
            "kernels by call, of each (a kernel of several calls counts for the one with most of its nodes)",
            [
                ("call", "calls", *columns, "fused attentions"),
                *(
                    (run.name, run.calls, *run.counts)
                    for run in runs(segment.calls, *by_call, segment.fused_attentions)
                ),
            ],
        ),
        _quantized(segment),
        titled("most frequent kernels", names.most_common(_LISTED)),
        *traffic_text(data["traffic"], segment.calls, segment.fused_attentions),
        f"layers: {len(layers)}, of which {sum(layer.is_kernel for layer in layers)} are kernels (--json lists all)",
    ]


def targets_text(records: Mapping[str, EngineRecord], traffic: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Sections about each TensorRT engine of a bundle.

    Args:
        records: by the engine's name: its target's, or that of one of its parts.
        traffic: what `describe_traffic` gave, by the same names.
    """
    sections = []
    for name, record in records.items():
        calls = [call for segment in record.segments for call in segment.calls]
        sections += [_target(name, record), *traffic_text(traffic[name], calls, record.fused_attentions)]
    return sections


def profiles_text(profiles: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """A table of optimization profiles; a call takes the first that fits it."""
    rows = [(i, axis, *bounds) for i, profile in enumerate(profiles) for axis, bounds in profile.items()]
    return titled("profiles", [("profile", "axis", "min", "opt", "max"), *rows])


def _target(name: str, record: EngineRecord) -> str:
    fused = record.fused_attentions
    by_type = ", ".join(f"{kind} {count}" for kind, count in _by_type(record.kernels_by_type))
    calls = [call for segment in record.segments for call in segment.calls]
    by_call = ", ".join(
        f"{run.name}: {run.counts[0]}{' each' if run.calls > 1 else ''}"
        for run in runs(calls, record.kernels_by_call)
        if run.counts[0]
    )
    # TensorRT compiles a plan for each profile
    together = f" of {len(record.profiles)} profiles together" if len(record.profiles) > 1 else ""
    kernels = f", {fused.total()} kernels in {len(fused)} blocks" if fused.total() else ""
    facts = [
        ("for", _built_for(record)),
        ("attention", record.attention + kernels),
        ("kernels", f"{record.kernels}{together}: {by_type}"),
        ("by call", by_call),
        *(
            (f"profile {i}", ", ".join(f"{axis} {sizes}" for axis, sizes in profile.items()))
            for i, profile in enumerate(record.profiles)
        ),
        *(
            (
                PurePosixPath(segment.file).name,
                f"{in_units(segment.nbytes)}, {first_to_last(segment.calls)}, built in {segment.seconds:.1f} s",
            )
            for segment in record.segments
        ),
    ]
    return titled(f"engine {plain(name)}", facts)


def _operations(layer: EngineLayer) -> str:
    """What kernels of one kind share: ``__myl_FcAdd`` of ``__myl_FcAdd_myl0_12``, or their type."""
    match = _GENERATED.fullmatch(layer.name)
    return match[1] if match else f"{layer.type}, by another name"


def _built_for(record: EngineRecord) -> str:
    return f"{record.flavour} {record.version} and no other, compute capability {', '.join(record.capabilities)}"


def _by_type(kernels: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(kernels.items(), key=lambda entry: (-entry[1], entry[0]))
