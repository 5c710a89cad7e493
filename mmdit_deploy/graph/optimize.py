"""Optimize one ONNX file, ours or somebody else's: fuse, and lower to a dialect. Weights are never loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from mmdit_deploy.atomic import write_whole
from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.fuse import FUSE
from mmdit_deploy.graph.lower import DIALECTS, lower
from mmdit_deploy.graph.lower.multi_head_attention import MICROSOFT
from mmdit_deploy.graph.onnx_file import executed_ops, external_files, is_beside_model, read_onnx, to_ir
from mmdit_deploy.graph.passes import PassResult, run

STANDARD = "standard"
# What the passes are about; counted before and after.
COUNTED = {
    "Attention": "Attention",
    "MultiHeadAttention": f"{MICROSOFT}.MultiHeadAttention",
    "RMSNormalization": "RMSNormalization",
    "LayerNormalization": "LayerNormalization",
    "Gelu": "Gelu",
}


@dataclass(frozen=True)
class Optimized:
    """What was done to a graph.

    Args:
        dialect: what it was lowered to.
        passes: each pass with how often it fired, in order.
        before, after: executed nodes of the ops in `COUNTED`.
    """

    dialect: str
    passes: tuple[PassResult, ...]
    before: Mapping[str, int]
    after: Mapping[str, int]


def optimize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dialect: str = STANDARD,
    *,
    force: bool = False,
) -> Optimized:
    """Fuse the graph of an ONNX file, lower it, and write it. On any failure nothing is written.

    Args:
        source: the model. Its external weights stay where they are.
        target: the file to write. Beside `source` if that has external weights: references are relative.
        dialect: ``standard``, or one of `mmdit_deploy.graph.lower.DIALECTS`.
        force: replace `target` if it is there; it may be `source`.

    Returns:
        What was done.

    Raises:
        UsageError: an unknown dialect, `source` is no ONNX model, or `target` cannot be written there.
        GraphError: a pass failed.
        OSError: the disk is full, or the like.
    """
    source, target = Path(source), Path(target)
    _check_dialect(dialect)
    proto = read_onnx(source)
    _check_target(proto, source, target, force=force)
    model = to_ir(proto, source.parent)
    passes = run(model, FUSE)
    if dialect != STANDARD:
        model, lowered = lower(model, dialect)
        passes += lowered
    result = ir.to_proto(model)
    write_whole(target, result.SerializeToString(deterministic=True))
    return Optimized(dialect, passes, _counts(proto), _counts(result))


def _counts(model: onnx.ModelProto) -> dict[str, int]:
    found = executed_ops(model)
    return {name: found.get(op, 0) for name, op in COUNTED.items()}


def _check_dialect(dialect: str) -> None:
    known = (STANDARD, *DIALECTS)
    if dialect not in known:
        raise UsageError(f"a dialect is one of {', '.join(known)}", received=repr(dialect), fix="name one")


def _check_target(model: onnx.ModelProto, source: Path, target: Path, *, force: bool) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise UsageError("the folder to write to must exist", received=str(folder), fix=f"mkdir -p {folder}")
    if target.is_dir():
        raise UsageError("what is written is a file", received=f"the folder {target}", fix="name a file")
    external = external_files(model)
    outside = [file.location for file in external if not is_beside_model(file.location)]
    if outside:
        raise UsageError(
            "the external weights of an ONNX model must lie in its folder",
            received=", ".join(ascii(location) for location in outside[:3]),
            fix="save the model with its weights beside it",
        )
    if external and not os.path.samefile(folder, source.parent):
        raise UsageError(
            f"{source} refers to weights beside it, so the optimized model must be in the same folder",
            received=str(target),
            fix=f"write {source.parent / target.name}",
        )
    # Resolved, because a link or another spelling may lead to the same file.
    if target.resolve() in {(source.parent / file.location).resolve() for file in external}:
        raise UsageError(
            f"the optimized model must not replace the weights of {source}",
            received=str(target),
            fix="name another file",
        )
    if not force and (target.exists() or target.is_symlink()):
        same = target.exists() and os.path.samefile(source, target)
        raise UsageError(
            "an existing file is replaced only on request",
            received=f"{target}, {'the input itself' if same else 'an existing file'}",
            fix="--force, or another name",
        )
