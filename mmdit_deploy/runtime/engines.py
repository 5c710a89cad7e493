"""The engines that a bundle has: their files, and which of them this machine can run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmdit_deploy.build import EngineRecord, Target, parse_target
from mmdit_deploy.build.layers_file import read_record
from mmdit_deploy.bundle import Bundle, graph_file
from mmdit_deploy.contract import Contract
from mmdit_deploy.errors import BundleError, MachineError, MissingPackageError, MMDiTError, UsageError
from mmdit_deploy.runtime.fit import EXPORT_FOR_CPU, check_runs_here, either
from mmdit_deploy.runtime.ort import check_provider
from mmdit_deploy.runtime.split import Loadable, Parts


def engine_graph(bundle: Bundle, target: str, *, conditioning: bool = False) -> Path:
    """The graph file of a bundle's engine: what ONNX Runtime runs, or the whole model as TensorRT would be given it.

    TensorRT's engine files were not built from that one: each segment was cut out of ``model.onnx`` and lowered alone.

    Args:
        conditioning: of a bundle in two parts, that part; else the trunk.

    Raises:
        BundleError: the bundle has no engines.
        UsageError: there is no such target.
        MachineError: the bundle lacks the target's engine.
    """
    return bundle.file(_entry(bundle, parse_target(target), conditioning)["graph"])


def stepped_graph(bundle: Bundle, target: str) -> Path:
    """The graph file of the whole model that an ONNX Runtime engine is, or that its two parts are: to step through.

    Raises:
        BundleError: the bundle has no engines, or its record of this one is broken.
        UsageError: there is no such target.
        MachineError: the bundle lacks the target's engine.
    """
    if bundle.split is None:
        return engine_graph(bundle, target)
    return bundle.file(graph_file(str(_entry(bundle, parse_target(target)).get("dialect"))))


def engine_parts(bundle: Bundle, target: str) -> Parts | None:
    """The part of an engine besides its trunk; None where it is in one piece.

    Raises:
        BundleError, UsageError, MachineError: as `engine_files`.
    """
    if bundle.split is None:
        return None
    if parse_target(target).flavour is None:
        return Parts(bundle.split, Loadable((engine_graph(bundle, target, conditioning=True),)))
    record, files = engine_files(bundle, target, conditioning=True)
    return Parts(bundle.split, Loadable(tuple(files), record))


def engine_files(bundle: Bundle, target: str, *, conditioning: bool = False) -> tuple[EngineRecord, list[Path]]:
    """What was built for a TensorRT target, and its engine files, in the order in which they run.

    Args:
        conditioning: of a bundle in two parts, that part; else the trunk.

    Raises:
        BundleError: the bundle has no engines, or the manifest's record of this one is broken.
        UsageError: there is no such target, or it is none of a TensorRT.
        MachineError: the bundle lacks the target's engine.
    """
    parsed = parse_target(target)
    entry = _entry(bundle, parsed, conditioning)
    if parsed.flavour is None:
        raise UsageError(
            "engine files are TensorRT's",
            received=f"{target}, which runs {entry['graph']}",
            fix="name a TensorRT target",
        )
    record = read_record(parsed.name, entry, f"the manifest of {bundle.name}")
    try:
        _check_record(record, parsed, _contract(bundle, conditioning))
    except ValueError as error:
        raise BundleError(
            f"the segments of {parsed.name} are a chain from the contract's inputs to its outputs",
            received=f"{bundle.name}: {error}",
            fix="copy the bundle again, or export it again",
        ) from None
    return record, [bundle.file(segment.file) for segment in record.segments]


def runnable_target(bundle: Bundle, device: torch.device | str | None = None) -> str:
    """The engine of the bundle that this machine can run: a TensorRT that fits the GPU, then ONNX Runtime there, then
    on the CPU.

    Args:
        device: that it must run on; by default any, and of GPUs torch's current one.

    Raises:
        BundleError: the bundle has no engines.
        MissingPackageError: none of its engines runs here, and one would with a package.
        MachineError: none of its engines runs here.
    """
    device = None if device is None else torch.device(device)
    refusals: dict[str, MMDiTError] = {}
    for name in sorted(_engines(bundle), key=_preference):  # in the bundle's order among equals
        try:
            check_runnable(bundle, name, device)
        except (MachineError, UsageError) as error:  # a later version may know more targets
            refusals[name] = error
        else:
            return name
    for refusal in refusals.values():
        if isinstance(refusal, MissingPackageError):
            raise refusal
    remedies = [str(refusal.fix) for refusal in refusals.values() if isinstance(refusal, MachineError)]
    remedies += [] if device is None else ["name no device"]
    remedies += [EXPORT_FOR_CPU] if device is None or device.type == "cpu" else []
    raise MachineError(
        f"a bundle needs an engine that this machine can run{'' if device is None else f' on {device}'}, "
        f"and {bundle.name} has {', '.join(refusals)}",
        received="; ".join(f"{name}: {refusal.received}" for name, refusal in refusals.items()),
        fix=either(*remedies),
    )


def check_runnable(bundle: Bundle, target: str, device: torch.device | None = None) -> None:
    """Check that a bundle has a target's engine, and that it runs here; nothing is deserialized.

    Args:
        device: that it is to run on; by default any of the target's kind, and of GPUs torch's current one.

    Raises:
        BundleError: the bundle has no engines, or its record of this one is broken.
        UsageError: there is no such target, or the device is none of its kind.
        MissingPackageError: the runtime is not installed.
        MachineError: the bundle lacks the engine, or it cannot run here.
    """
    parsed = parse_target(target)
    check_device(parsed, device)
    engine_parts(bundle, target)
    if parsed.flavour is None:
        engine_graph(bundle, target)
        check_provider(parsed)
    else:
        check_runs_here(engine_files(bundle, target)[0], parsed, device)


def check_device(target: Target, device: torch.device | None) -> None:
    """Check that a device is of the kind that a target runs on.

    Raises:
        UsageError: it is not.
    """
    if device is not None and device.type != target.device:
        raise UsageError(
            f"{target.name} runs on {target.device}",
            received=f"the device {device}",
            fix="name no device, or another target",
        )


def _entry(bundle: Bundle, target: Target, conditioning: bool = False) -> Mapping[str, Any]:
    engines = _engines(bundle)
    if target.name not in engines:
        raise MachineError(
            f"the bundle {bundle.name} has engines for {', '.join(engines)}",
            received=target.name,
            fix=f"mmdit-export … --target {target.name}",
        )
    entry = engines[target.name]
    return entry["conditioning"] if conditioning else entry


def _contract(bundle: Bundle, conditioning: bool) -> Contract:
    """Of what an entry is about: the model, or a part of it."""
    if bundle.split is None:
        return bundle.contract
    return bundle.split.conditioning if conditioning else bundle.split.trunk


def _engines(bundle: Bundle) -> Mapping[str, Mapping[str, Any]]:
    engines: Mapping[str, Mapping[str, Any]] = bundle.manifest.fields["engines"]
    if not engines:
        raise BundleError(
            "only an engine can be run",
            received=f"{bundle.name}, a bundle of graphs alone (--graph-only)",
            fix="export it without --graph-only",
        )
    return engines


def _preference(name: str) -> int:
    return 2 if name == "ort-cpu" else 1 if name == "ort-cuda" else 0


def _check_record(record: EngineRecord, target: Target, contract: Contract) -> None:
    """That the segments are a chain from the contract's inputs to its outputs: addresses are taken by these names.

    Raises:
        ValueError: they are not.
    """
    if target.flavour is None or record.flavour != target.flavour.name:
        raise ValueError(f"an engine of {record.flavour}")
    if not all(set(p) >= set(contract.ranges) for p in record.profiles):
        raise ValueError("a profile without a range for each axis")
    known = {spec.name: spec for spec in contract.inputs}
    for segment in record.segments:
        for spec in segment.inputs:
            if known.get(spec.name) != spec:
                raise ValueError(f"{segment.file} reads {spec.name}, which nothing before it writes so")
        for spec in segment.outputs:
            if spec.name in known:
                raise ValueError(f"{segment.file} writes {spec.name} again")
            known[spec.name] = spec
    for spec in contract.outputs:
        if known.get(spec.name) != spec:
            raise ValueError(f"no segment writes {spec.name} as the contract has it")
