"""What a bundle says about itself: the manifest's fields, and the reports."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mmdit_deploy.build import RTX, TENSORRT, EngineRecord, Target, dialect_of, execution_of
from mmdit_deploy.bundle import graph_file
from mmdit_deploy.checkpoint.weights import RandomWeights
from mmdit_deploy.contract import Contract
from mmdit_deploy.export.parts import CONDITIONING, TRUNK, BuiltEngines
from mmdit_deploy.export.planning import Planned
from mmdit_deploy.export.request import ExportRequest
from mmdit_deploy.graph.pipeline import Graphs
from mmdit_deploy.graph.split import SplitGraphs
from mmdit_deploy.report import write_html
from mmdit_deploy.verify import Verdict

WEIGHTS = "weights.safetensors"
STANDARD = "model.onnx"
VERSIONED = (
    "mmdit-deploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    *RTX.distributions,
    *TENSORRT.distributions,
    "numpy",
    "safetensors",
)


def manifest_fields(
    request: ExportRequest,
    contract: Contract,
    graphs: Graphs,
    split: SplitGraphs | None,
    targets: Sequence[Target],
    built: BuiltEngines,
    verdicts: Sequence[Verdict],
    planned: Planned,
) -> dict[str, Any]:
    """Everything that the manifest says but for the files.

    Args:
        split: the parts of a model in two.
        built: of the TensorRT targets.
    """
    source, bf16 = request.source, bool(planned.plan.bf16_attentions)
    return {
        "name": request.spec.name,
        "precision": request.precision.name,
        "base": request.precision.base,
        "precision_plan": planned.to_json(),
        "spec": request.spec.to_json(),
        "contract": contract.to_json(),
        "split": None if split is None else split.contract.to_json(),
        "outputs": list(request.outputs),
        "weights": {
            "origin": request.weights.description,
            "random": isinstance(source, RandomWeights),
            **({"seed": source.seed} if isinstance(source, RandomWeights) else {}),
            "loras": [lora.to_json() for lora in request.loras],
            "file": None if request.graph_only else WEIGHTS,
        },
        "engines": {}
        if request.graph_only
        else {t.name: _engine(request, t, split is not None, built, bf16) for t in targets},
        "recipe": request.recipe,
        "graph": {
            "kinds": list(graphs.kinds),
            "census": dict(graphs.census),
            "passes": {name: {r.name: r.count for r in results} for name, results in graphs.passes.items()},
        },
        "verified": [v.target for v in verdicts if v.passed and v.engine_executed],
        "versions": versions(),
    }


def _engine(request: ExportRequest, target: Target, in_two: bool, built: BuiltEngines, bf16: bool) -> dict[str, Any]:
    """An engine's entry: of a model in two parts that of the trunk, with the conditioning's in it."""
    dialect = dialect_of(target, request.precision, bf16_attentions=bf16)

    def entry(records: Mapping[str, EngineRecord], part: str) -> dict[str, Any]:
        how = {
            "graph": graph_file(dialect, part),
            "dialect": dialect,
            "execution": execution_of(target, request.precision),
        }
        return {**how, **records[target.name].to_json()} if target.name in records else how

    if not in_two:
        return entry(built.records, "model")
    return {**entry(built.records, TRUNK), CONDITIONING: entry(built.conditioning, CONDITIONING)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_reports(folder: Path, fields: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    """Write ``parity.json`` and ``report.html``; nothing where nothing was verified."""
    if not verdicts:
        return
    data = {"verdicts": [v.to_json() for v in verdicts]}
    (folder / "parity.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    facts = {
        "model": fields["name"],
        "precision": fields["precision"],
        "weights": fields["weights"]["origin"],
        "machine": f"{platform.system()} {platform.machine()}",
        **{f"{name} version": version for name, version in fields["versions"].items()},
    }
    write_html(verdicts, folder / "report.html", title=f"{fields['name']} {fields['precision']}", facts=facts)
