"""What is in a bundle, as data: every byte is hashed, and what is said of its engines must be what was built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mmdit_deploy.build import EngineRecord
from mmdit_deploy.build.layers_file import FILE_NAME, read_layers, read_record
from mmdit_deploy.bundle import Bundle, open_bundle
from mmdit_deploy.bundle.manifest import MANIFEST
from mmdit_deploy.calibration.bundle_plan import bundle_plan
from mmdit_deploy.checkpoint.strict_json import parse_json_object
from mmdit_deploy.cli.describe_traffic import describe_traffic, gpus_data
from mmdit_deploy.errors import BundleError
from mmdit_deploy.graph.onnx_file import read_onnx
from mmdit_deploy.graph.weight_spans import weight_bytes
from mmdit_deploy.precision import SCHEMES

CONDITIONING = "conditioning"
PARTS = (CONDITIONING, "trunk")


def describe_bundle(path: Path) -> dict[str, Any]:
    """A bundle that was checked, every byte of it.

    Raises:
        BundleError: it is not whole, or not what its manifest says.
    """
    bundle = open_bundle(path)
    records = _records(bundle)
    fields = bundle.manifest.fields
    files = {name: record.size for name, record in sorted(bundle.manifest.files.items())}
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "name": bundle.name,
        "precision": bundle.precision.name,
        "base": bundle.precision.base,
        "precision_plan": _precision_plan(bundle),
        "weights": fields["weights"],
        "spec": bundle.spec.to_json(),
        "contract": bundle.contract.to_json(),
        "split": _split(bundle),
        "engines": fields["engines"],
        "traffic": {name: _traffic(record, bundle) for name, record in records.items()},
        "gpus": {name: gpus_data(record) for name, record in records.items()},
        "verdicts": _verdicts(bundle),
        "versions": _mapping(fields.get("versions")),
        "files": files,
        "bytes": sum(files.values()),
    }


def _precision_plan(bundle: Bundle) -> dict[str, Any]:
    """How many linear layers are quantized by each scheme, FP8 attentions, and values that stay in fp32, by call.

    Raises:
        BundleError: the manifest and the scales do not fit together.
    """
    weights = bundle.manifest.fields["weights"]
    if "file" in weights and weights["file"] is None:
        return _stated_plan(bundle)
    plan = bundle_plan(bundle)
    return {
        "linears": dict(Counter(linear.scheme.name for linear in plan.linears.values())),
        "fp8_attentions": sum(map(len, plan.attentions.values())),
        "fp32_values": {call: len(names) for call, names in plan.wide.items()},
        "bf16_attentions": list(plan.bf16_attentions),
    }


def _stated_plan(bundle: Bundle) -> dict[str, Any]:
    """The same of a bundle of graphs alone, which has no scales: what its manifest says.

    Raises:
        BundleError: that is not what this version writes.
    """
    stated: Any = bundle.manifest.fields.get("precision_plan", {})
    try:
        schemes = [SCHEMES[linear["scheme"]].name for linear in stated.get("linears", {}).values()]
        return {
            "linears": dict(Counter(schemes)),
            "fp8_attentions": sum(len(found) for found in stated.get("fp8_attentions", {}).values()),
            "fp32_values": {call: len(names) for call, names in stated.get("wide", {}).items()},
            "bf16_attentions": [str(call) for call in stated.get("bf16_attentions", [])],
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise BundleError(
            f"the precision_plan of {bundle.path} says how each linear layer is quantized, as this version writes it",
            received=f"{type(error).__name__}: {ascii(str(error))[:120]}",
            fix="copy the bundle again, or export it again",
        ) from error


def is_tensorrt(entry: Mapping[str, Any]) -> bool:
    """Whether an engine's entry in a manifest is a TensorRT target's, which has engine files."""
    return "segments" in entry or "flavour" in entry


def tensorrt_entries(engines: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Targets and entries of all TensorRT engines of a manifest, by a name for people.

    Of a target in two parts the trunk has the target's name, and ``rtx:sm89 conditioning`` is the other one.
    """
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for target, entry in engines.items():
        if is_tensorrt(entry):
            found[target] = target, entry
            if isinstance(own := entry.get(CONDITIONING), Mapping):
                found[f"{target} {CONDITIONING}"] = target, own
    return found


def _records(bundle: Bundle) -> dict[str, EngineRecord]:
    """What a bundle's manifest says of its TensorRT engines, checked, so that it can be counted with.

    Raises:
        BundleError: it is no record of a build, or of files that are not in the bundle.
    """
    manifest = bundle.path / MANIFEST
    records = {
        name: read_record(target, entry, str(manifest))
        for name, (target, entry) in tensorrt_entries(bundle.manifest.fields["engines"]).items()
    }
    for record in records.values():
        _check_files(record, bundle, manifest)
    return records


def _split(bundle: Bundle) -> dict[str, Any] | None:
    """Of a bundle in two parts: their contracts, and the bytes of weights that each reads; None of one in one piece.

    Raises:
        BundleError: it lacks the graph of a part.
    """
    if bundle.split is None:
        return None
    said = bundle.split.to_json()
    return {part: {"weight_bytes": _weight_bytes(bundle, part), "contract": said[part]} for part in PARTS}


def _weight_bytes(bundle: Bundle, part: str) -> int:
    """Of a part's graph; those of all dialects read the same."""
    graphs = [name for name in bundle.manifest.files if name.startswith(f"{part}.") and name.endswith(".onnx")]
    if not graphs:
        raise BundleError(
            f"{bundle.path}, a bundle in two parts, has a graph of each",
            received=f"no {part}.*.onnx",
            fix="copy the bundle again, or export it again",
        )
    model = read_onnx(bundle.file(graphs[0]))
    return weight_bytes(model)


def _traffic(record: EngineRecord, bundle: Bundle) -> list[dict[str, Any]]:
    """What a target's kernels move, by profile: from its `layers.json`, where the bundle has one.

    Raises:
        BundleError: it is broken, or about another build than the manifest.
    """
    beside = f"{PurePosixPath(record.segments[0].file).parent}/{FILE_NAME}"
    if beside not in bundle.manifest.files:
        return []
    path = bundle.file(beside)
    built, files = read_layers(path)
    if _shape(built) != _shape(record):
        raise BundleError(
            f"{path} is about the engine files and profiles in the manifest",
            received=f"others, of the target {ascii(built.target)[:80]}",
            fix="copy the bundle again, or export it again",
        )
    return describe_traffic(record, files, kernels=False)


def _shape(record: EngineRecord) -> tuple[Any, ...]:
    return record.profiles, tuple((segment.file, segment.nbytes, segment.calls) for segment in record.segments)


def _check_files(record: EngineRecord, bundle: Bundle, manifest: Path) -> None:
    for segment in record.segments:
        file = bundle.manifest.files.get(segment.file)
        if file is None or file.size != segment.nbytes:
            raise BundleError(
                f"{manifest} lists the engine files of {ascii(record.target)[:80]} with the sizes in its record",
                received=f"{ascii(segment.file)[:200]} of {segment.nbytes} bytes, listed with "
                f"{file.size if file else 'none'}",
                fix="copy the bundle again, or export it again",
            )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _verdicts(bundle: Bundle) -> list[dict[str, Any]]:
    """Of each engine that was verified: the outcome, and the largest error that the tolerance binds."""
    name = "parity.json"
    if name not in bundle.manifest.files:
        return []
    again = "export the bundle again"
    data = parse_json_object(bundle.file(name).read_bytes(), str(bundle.file(name)), again)
    try:
        return [_verdict(verdict) for verdict in data["verdicts"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise BundleError(
            f"{bundle.file(name)} must hold the verdicts as this version writes them",
            received=f"{type(error).__name__}: {error}",
            fix=again,
        ) from error


def _verdict(verdict: dict[str, Any]) -> dict[str, Any]:
    errors = [check["errors"]["rel_l2"] for check in verdict["checks"] if check["binding"]]
    if not all(error is None or (type(error) in (int, float) and not abs(error) > 1e308) for error in errors):
        raise TypeError("an error is a number or null")
    return {
        "target": verdict["target"],
        "passed": verdict["passed"],
        "engine_executed": verdict.get("engine_executed", True),
        "checks": len(errors),
        # null stands for NaN, which is worse than any figure
        "worst_rel_l2": None if None in errors else max(errors, default=None),
        "not_executed": list(verdict["not_executed"]),
    }
