"""What happens to one graph between two files. It runs in a process of its own: see `mmdit_deploy.graph.optimize`.

    read ─► check ─► prepare ─► fuse ─► clean up ─► lower, once a file ─► check ─► write

Where no rule fires the file is copied byte for byte: what there is nothing to do for is not rewritten.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from mmdit_deploy.atomic import write_synced
from mmdit_deploy.errors import GraphError, UsageError
from mmdit_deploy.graph.calls import executed_ops
from mmdit_deploy.graph.checks.external_data import external_files
from mmdit_deploy.graph.checks.onnx_checker import check_with_onnx
from mmdit_deploy.graph.checks.well_formed import check_well_formed
from mmdit_deploy.graph.dialects import STANDARD
from mmdit_deploy.graph.fuse import CLEAN, FUSE, PREPARE
from mmdit_deploy.graph.fuse.interface import kept_interface
from mmdit_deploy.graph.lower import lower
from mmdit_deploy.graph.named_functions import DOMAIN, NAMED_FUNCTIONS
from mmdit_deploy.graph.onnx_file import read_onnx, to_ir
from mmdit_deploy.graph.optimize import SUBJECTS
from mmdit_deploy.graph.passes import PassResult, run


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Optimize one file.

    Args:
        request: ``source``; and ``files``, each with the ``path`` that it will have, the ``partial`` path to write to,
            and its ``dialect``.

    Returns:
        JSON values: the passes that fused, and of each file the passes that lowered it and its ops.
    """
    source = Path(request["source"])
    proto = read_onnx(source)
    check_well_formed(proto, source.parent)
    check_with_onnx(proto)
    _check_places(proto, source, [Path(file["path"]) for file in request["files"]])
    model = to_ir(proto, source.parent)
    with kept_interface(model):
        prepared = run(model, PREPARE)
        fused = run(model, FUSE, explain=True)
        if any(step.count for step in fused):
            fused += run(model, CLEAN)
    files = [_write(source, proto, model, fused, Path(f["partial"]), f["dialect"]) for f in request["files"]]
    return {"prepared": _plain(prepared), "fused": _plain(fused), "before": _counts(proto), "files": files}


def _write(
    source: Path, proto: onnx.ModelProto, model: ir.Model, fused: Sequence[PassResult], partial: Path, dialect: str
) -> dict[str, Any]:
    """Lower to one dialect, and write it."""
    result, lowered = lower(model, dialect, explain=True) if dialect != STANDARD else (model, ())
    changed = any(step.count for step in (*fused, *lowered))
    made = ir.to_proto(result) if changed else proto
    if changed:
        _check_made(made)
    write_synced(partial, made.SerializeToString(deterministic=True) if changed else source.read_bytes())
    return {"passes": _plain(lowered), "ops": _counts(made), "changed": changed}


def _check_made(made: onnx.ModelProto) -> None:
    try:
        check_with_onnx(made)
    except UsageError as error:
        raise GraphError(
            "an optimized graph must be one that ONNX's checker accepts",
            received=error.received,
            fix="report this as a bug",
        ) from error


def _counts(model: onnx.ModelProto) -> dict[str, int]:
    found = executed_ops(model, whole=[(DOMAIN, name) for name in NAMED_FUNCTIONS])
    subjects = [*SUBJECTS, *(f"{DOMAIN}.{name}" for name in NAMED_FUNCTIONS)]
    return {**dict.fromkeys(subjects, 0), **found}


def _plain(results: Sequence[PassResult]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(result) for result in results]


def _check_places(model: onnx.ModelProto, source: Path, targets: Sequence[Path]) -> None:
    """References to weights are relative to the folder, and weights are not to be written over."""
    external = external_files(model)
    weights = {(source.parent / file.location).resolve() for file in external}
    for target in targets:
        if external and not os.path.samefile(target.parent, source.parent):
            raise UsageError(
                f"{source} refers to weights beside it, so the optimized model must be in the same folder",
                received=str(target),
                fix=f"write {source.parent / target.name}",
            )
        # Resolved, because a link or another spelling may lead to the same file.
        if target.resolve() in weights:
            raise UsageError(
                f"the optimized model must not replace the weights of {source}",
                received=str(target),
                fix="name another file",
            )
