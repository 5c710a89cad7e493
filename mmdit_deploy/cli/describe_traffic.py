"""What a TensorRT target's kernels move at the opt shape of each profile, as data: per call and per kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.build.floor import Floor
from mmdit_deploy.build.gpus import GPU, gpus_of
from mmdit_deploy.build.layers import EngineLayer, by_call
from mmdit_deploy.build.layers_file import EngineFile
from mmdit_deploy.build.traffic import roofline, traffic_of


def describe_traffic(record: EngineRecord, files: Sequence[EngineFile], *, kernels: bool) -> list[dict[str, Any]]:
    """Bytes, FLOPs, floors and estimates, by profile.

    Args:
        files: engine files of the target, some or all.
        kernels: list them one by one, too.

    Returns:
        JSON values; nothing where a version built the engine that did not keep the sizes. ``seconds`` are estimates by
        a roofline over each kernel, by GPU, for the GPUs of the target's capabilities.
    """
    if not any(tensor.elements is not None for file in files for layer in file.layers for tensor in layer.outputs):
        return []
    gpus = gpus_of(record.capabilities)
    return [_profile(record, number, files, gpus, kernels=kernels) for number in range(len(record.profiles))]


def gpus_data(record: EngineRecord) -> list[dict[str, Any]]:
    """The GPUs that estimates are for: what NVIDIA publishes of them, and where."""
    return [dataclasses.asdict(gpu) for gpu in gpus_of(record.capabilities)]


def _profile(
    record: EngineRecord, number: int, files: Sequence[EngineFile], gpus: Sequence[GPU], *, kernels: bool
) -> dict[str, Any]:
    calls: dict[str, list[EngineLayer]] = {}
    floors: dict[str, Floor] = {}
    for file in files:
        plan = [layer for layer in file.layers if layer.profile == number]
        for call, made in by_call(plan, file.segment.calls).items():
            calls.setdefault(call, []).extend(made)
        floors |= file.segment.floors[number] if file.segment.floors else {}
    everything = [kernel for made in calls.values() for kernel in made]
    said: dict[str, Any] = {
        "opt": {axis: sizes.opt for axis, sizes in record.profiles[number].items()},
        "calls": {call: {**_costs(made, gpus), **_floor(floors.get(call))} for call, made in calls.items()},
        "all": _costs(everything, gpus),
    }
    if kernels:
        said["kernels"] = [
            {"name": kernel.name, "type": kernel.type, "call": call, **_costs([kernel], gpus)}
            for call, made in calls.items()
            for kernel in made
        ]
    return said


def _costs(kernels: Sequence[EngineLayer], gpus: Sequence[GPU]) -> dict[str, Any]:
    return {**traffic_of(kernels).to_json(), "seconds": {gpu.name: roofline(kernels, gpu) for gpu in gpus}}


def _floor(floor: Floor | None) -> dict[str, Any]:
    return {"floor": None if floor is None else floor.to_json()}
