"""Optimize one ONNX file, ours or somebody else's: fuse, and lower to a dialect. Weights are never loaded.

The file is read in a process of its own, because a malformed one can crash the libraries that read it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_deploy.atomic import written_together
from mmdit_deploy.errors import UsageError
from mmdit_deploy.graph.child import in_child
from mmdit_deploy.graph.dialects import STANDARD, USER_DIALECTS, outputs

# Ops that passes are about; with our named functions they are counted before and after, there or not.
SUBJECTS = (
    "Attention",
    "com.microsoft.MultiHeadAttention",
    "RotaryEmbedding",
    "RMSNormalization",
    "LayerNormalization",
    "Gelu",
)


@dataclass(frozen=True)
class LeftNode:
    """A near miss: where a rule's pattern was found, and what kept the rule from rewriting it.

    Args:
        node: its name, or its op and output.
        scope: the function that it is in; ``""`` in the main graph.
        reason: what was not as the rule needs it.
    """

    node: str
    scope: str
    reason: str


@dataclass(frozen=True)
class PassDone:
    """What one pass did.

    Args:
        name: of the pass.
        found: how often its pattern was there.
        fused: how many of these it rewrote.
        left: the others, and why.
    """

    name: str
    found: int
    fused: int
    left: tuple[LeftNode, ...]


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Args:
        path: of the file.
        dialect: what it was lowered to.
        changed: whether any rule fired; where none did, it is a copy of the source.
        passes: those that lowered it.
        ops: executed nodes by op: ``Attention``, ``com.microsoft.MultiHeadAttention``, ``mmdit.MMDiTSiLU``. Those
            that passes are about are there with 0 too.
    """

    path: str
    dialect: str
    changed: bool
    passes: tuple[PassDone, ...]
    ops: Mapping[str, int]


@dataclass(frozen=True)
class Optimized:
    """What was done to a graph.

    Args:
        source: the file.
        dialect: what it was lowered to.
        prepared: what made the graph readable for rules: its opset, its shapes.
        passes: each pass that fused or lowered, in order.
        before, after: executed nodes by op, as `Written.ops` has them.
        files: what was written: the target, and the second file of a dialect that has one.
    """

    source: str
    dialect: str
    prepared: tuple[PassDone, ...]
    passes: tuple[PassDone, ...]
    before: Mapping[str, int]
    after: Mapping[str, int]
    files: tuple[Written, ...]


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
        dialect: one of `mmdit_deploy.graph.dialects.USER_DIALECTS`. One with a second file writes that too.
        force: replace what is there; `target` may be `source`.

    Returns:
        What was found, what was done, and what was left alone and why.

    Raises:
        UsageError: an unknown dialect, `source` is no sound ONNX model, or `target` cannot be written there.
        GraphError: a pass failed.
        MachineError, MemoryError: the graph is too much for this machine.
        OSError: the disk is full, or the like.
    """
    source, target = Path(source), Path(target)
    if dialect not in USER_DIALECTS:
        known = ", ".join(USER_DIALECTS)
        raise UsageError(f"a dialect is one of {known}", received=repr(dialect), fix="name one")
    files = outputs(target, dialect)
    for path in files:
        _check_target(path, source, force=force)
        if path != target and path.exists() and source.exists() and os.path.samefile(path, source):
            raise UsageError(
                f"the second file of {dialect} goes beside the first, and not over the model",
                received=f"{path}, the input itself",
                fix="another name for the target",
            )
    with written_together(list(files)) as partials:
        written = [
            {"path": str(path), "partial": str(partial), "dialect": lowered_to}
            for (path, lowered_to), partial in zip(files.items(), partials, strict=True)
        ]
        answer = in_child("mmdit_deploy.graph.surgery:work", {"source": str(source), "files": written})
    return _optimized(source, dialect, files, answer)


def _optimized(source: Path, dialect: str, files: Mapping[Path, str], answer: Mapping[str, Any]) -> Optimized:
    written = tuple(
        Written(str(path), lowered_to, file["changed"], _passes(file["passes"]), file["ops"])
        for (path, lowered_to), file in zip(files.items(), answer["files"], strict=True)
    )
    passes = _passes(answer["fused"]) + written[0].passes
    prepared = _passes(answer["prepared"])
    return Optimized(str(source), dialect, prepared, passes, answer["before"], written[0].ops, written)


def _passes(results: list[dict[str, Any]]) -> tuple[PassDone, ...]:
    return tuple(
        PassDone(r["name"], r["count"] + len(r["left"]), r["count"], tuple(LeftNode(**left) for left in r["left"]))
        for r in results
    )


def _check_target(target: Path, source: Path, *, force: bool) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise UsageError("the folder to write to must exist", received=str(folder), fix=f"mkdir -p {folder}")
    if not os.path.lexists(target):
        return
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        found = "the folder" if target.is_dir() else "the device or pipe"
        raise UsageError("what is written is a file", received=f"{found} {target}", fix="name a file")
    if not force:
        same = target.exists() and source.exists() and os.path.samefile(source, target)
        raise UsageError(
            "an existing file is replaced only on request",
            received=f"{target}, {'the input itself' if same else 'an existing file'}",
            fix="--force, or another name",
        )
