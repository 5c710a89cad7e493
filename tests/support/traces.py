"""Each kind of call is traced once in a run of the tests, by whichever of its processes needs it first.

A trace takes a second or several, and a family has a dozen in each type. What comes of it, the ONNX function and the
program of PyTorch's operators, lies in files for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar
from unittest import mock

import onnx_ir as ir
import torch

from mmdit_deploy.eager.program import Program
from mmdit_deploy.graph.assemble import IR_VERSION
from mmdit_deploy.graph.named_functions import DOMAIN
from mmdit_deploy.graph.trace import export_kind, one_operator_registry, trace
from mmdit_deploy.model import Call, Kind
from mmdit_deploy.spec import ModelSpec

T = TypeVar("T")
FUNCTION, PROGRAM, WEIGHTS = "function.onnx", "program.pt2", "weights.json"
# What a block's function depends on besides its name, and what no other function depends on.
_OF_BLOCKS = (
    "num_heads", "head_dim", "mlp_ratio", "activation", "bias", "qk_norm", "txt_mask", "still_references", "fp16_clip",
    "rope_axes",
)  # fmt: skip
_NOT_OF_OTHERS = (
    "name",
    "family",
    "depth",
    "single_depth",
    "text_ends",
    "residuals",
    "dual_attention_blocks",
    "qk_norm",
    # what a function reads and makes shows these
    "latent_channels",
    "out_channels",
    "txt_dim",
    "pooled_dim",
    "guidance",
    "still_references",
)


class Traces:
    """What was traced.

    Args:
        folder: where the processes of a run share it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._functions: dict[object, ir.Function] = {}
        self._programs: dict[object, Program] = {}

    def functions(self, spec: ModelSpec, calls: Sequence[Call], dtype: torch.dtype) -> dict[str, ir.Function]:
        """What `trace_kinds` gives. They are shared: clone one before changing it."""
        return self._each(self._functions, _function, spec, calls, dtype)

    def programs(self, spec: ModelSpec, calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Program]:
        """What `programs_of` gives."""
        return self._each(self._programs, _program, spec, calls, dtype)

    @contextlib.contextmanager
    def within(self, spec: ModelSpec) -> Iterator[None]:
        """A context in which exports of a model, and their verification, take what was traced already."""

        def functions(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, ir.Function]:
            return self.functions(spec, calls, dtype)

        def programs(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Program]:
            return self.programs(spec, calls, dtype)

        with (
            mock.patch("mmdit_deploy.graph.pipeline.trace_kinds", functions),
            mock.patch("mmdit_deploy.calibration.graph_values.trace_kinds", functions),
            mock.patch("mmdit_deploy.export.planning.programs_of", programs),
            mock.patch("mmdit_deploy.verify.as_planned.programs_of", programs),
            mock.patch("mmdit_deploy.verify.bisect.programs_of", programs),
        ):
            yield

    def _each(
        self,
        known: dict[object, T],
        read: Callable[[Path, Kind, torch.dtype], T],
        spec: ModelSpec,
        calls: Sequence[Call],
        dtype: torch.dtype,
    ) -> dict[str, T]:
        kinds = {_key(spec, call.kind, dtype): call.kind for call in calls}
        for wait in (False, True):  # what another process traces at this moment comes last
            for key, kind in kinds.items():
                if key not in known and (folder := self._traced(key, kind, dtype, wait=wait)):
                    known[key] = read(folder, kind, dtype)
        return {kind.function: known[key] for key, kind in kinds.items()}

    def _traced(self, key: object, kind: Kind, dtype: torch.dtype, *, wait: bool) -> Path | None:
        """The folder of a trace, made where it is not there; None where another process does that, without `wait`."""
        folder = self._folder / hashlib.sha256(repr(key).encode()).hexdigest()
        with folder.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                partial.mkdir()
                _trace(partial, kind, dtype)
                partial.rename(folder)
        return folder


def _trace(folder: Path, kind: Kind, dtype: torch.dtype) -> None:
    with one_operator_registry():
        program, weights = export_kind(kind, dtype)
    torch.export.save(program.exported_program, folder / PROGRAM, extra_files={WEIGHTS: json.dumps(weights)})
    with mock.patch("mmdit_deploy.graph.trace.export_kind", lambda *_: (program, weights)):
        graph = trace(kind, dtype).graph
    # As a graph: a function's protobuf has no types of its inputs.
    ir.save(ir.Model(graph, ir_version=IR_VERSION), folder / FUNCTION)


def _function(folder: Path, kind: Kind, dtype: torch.dtype) -> ir.Function:
    return ir.Function(DOMAIN, kind.function, graph=ir.load(folder / FUNCTION).graph, attributes=[])


def _program(folder: Path, kind: Kind, dtype: torch.dtype) -> Program:
    extra = {WEIGHTS: ""}
    logger = logging.getLogger("torch._export.serde.serialize")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of fake example inputs, which are read by another way than real ones
    try:
        exported = SimpleNamespace(exported_program=torch.export.load(folder / PROGRAM, extra_files=extra))
    finally:
        logger.setLevel(level)
    with mock.patch("mmdit_deploy.eager.program.export_kind", lambda *_: (exported, json.loads(extra[WEIGHTS]))):
        return Program(kind, dtype)


def _key(spec: ModelSpec, kind: Kind, dtype: torch.dtype) -> object:
    """What the trace of a kind depends on.

    What a kind reads and makes says more than the spec: of what kind a block is, and how many residuals there are.
    """
    of_kind = kind.function, kind.inputs, kind.outputs
    if kind.function.endswith("Block"):
        return tuple(getattr(spec, field) for field in _OF_BLOCKS), of_kind, dtype
    return tuple(v for field, v in dataclasses.asdict(spec).items() if field not in _NOT_OF_OTHERS), of_kind, dtype
